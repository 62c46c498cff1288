"""What four bits cost: perplexity, file size and memory of a model under each scheme and method.

    python benchmarks/quantized_perplexity.py --windows 32            # hours on two cores
    python benchmarks/quantized_perplexity.py --only nvfp4:gptq,w4a8:gptq --windows 16

Measured on WikiText-2's validation text (`wikitext2/valid.txt` in TRIMTAB_DATA), in windows of 1024
tokens evenly spread over it, which share no context. Calibration never sees it: the text is the
default of `trimtab quantize`, written once into the work folder. Each arm is quantised into a
folder there and loaded as a server loads it, so that its numbers are the engine's; an arm whose
folder is there already is only measured. Resident bytes are those of the model's parameters and
buffers and of what its quantised layers hold, on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trimtab.steering.model.loading import load_model
from trimtab.steering.model.quantized.linear import QuantizedLinear
from trimtab.training.quantization.build import quantize_model
from trimtab.training.quantization.calibration_text import (
    CalibrationText,
    default_text,
    tokens_of,
)
from trimtab.training.quantization.perplexity import nll, windows
from trimtab.training.quantization.settings import QuantizeSettings

# scheme:method, and after slashes what else: lorcN, keep=PATTERN, mixed=BITS.
ARMS = (
    "nvfp4:rtn",
    "nvfp4:mse",
    "nvfp4:awq",
    "nvfp4:gptq",
    "nvfp4:awq+gptq",
    "nvfp4:gptq/lorc16",
    "nvfp4:gptq/keep=down_proj",
    "nvfp4:zeroquant-fp",
    "w4a8:rtn",
    "w4a8:gptq",
    "mxfp4:rtn",
    "mxfp4:gptq",
    "int4:rtn",
    "int4:gptq",
)


def settings_of(arm: str) -> QuantizeSettings:
    """Return the settings that an arm's name stands for."""
    scheme, _, rest = arm.partition(":")
    method, *more = rest.split("/")
    options: dict[str, Any] = {}
    for word in more:
        if word.startswith("lorc"):
            options["lorc"] = int(word.removeprefix("lorc"))
        elif word.startswith("keep="):
            options["keep"] = ((word.removeprefix("keep="), "fp8"),)
        elif word.startswith("mixed="):
            options["mixed"] = float(word.removeprefix("mixed="))
        else:
            sys.exit(f"{arm}: {word!r} is none of lorcN, keep=PATTERN, mixed=BITS.")
    return QuantizeSettings(scheme=scheme, method=method, **options)


def resident_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of everything the model holds, shared tensors once."""
    tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
    packed = [m.prepared for m in model.modules() if isinstance(m, QuantizedLinear)]
    return sum(tensors.values()) + sum(p.n_bytes for p in packed if p is not None)


def file_bytes(folder: Path) -> int:
    """Return the bytes of a folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def calibration(work: Path, model: str, *, rows: int, tokens: int) -> CalibrationText:
    """Return the calibration text, written once."""
    path = work / f"calibration-{rows}x{tokens}.json"
    if not path.is_file():
        loaded = load_model(model, device="cpu", dtype="bfloat16")
        text = default_text(loaded.model, loaded.tokenizer, n_rows=rows, n_tokens=tokens)
        said = {"ids": text.ids.tolist(), "held": text.held.tolist(), "origin": text.origin}
        path.write_text(json.dumps(said), encoding="utf-8")
    said = json.loads(path.read_text(encoding="utf-8"))
    return CalibrationText(torch.tensor(said["ids"]), torch.tensor(said["held"]), said["origin"])


def measured(name: str, source: str, rows: torch.Tensor, base: float | None) -> dict[str, Any]:
    """Load a model as a server does, measure it, and print its row."""
    loaded = load_model(source, device="cpu", dtype="bfloat16")
    began = time.perf_counter()
    loss = nll(loaded.model, rows)
    row = {
        "arm": name,
        "nll": loss,
        "perplexity": math.exp(loss),
        "delta": None if base is None else loss - base,
        "file_bytes": file_bytes(loaded.source_path or Path(source)),
        "resident_bytes": resident_bytes(loaded.model),
        "seconds": time.perf_counter() - began,
    }
    delta = "" if base is None else f"{loss - base:+.4f}"
    print(
        f"{name:28} {loss:8.4f} {math.exp(loss):8.3f} {delta:>8} "
        f"{row['file_bytes'] / 1e6:9.1f} {row['resident_bytes'] / 1e6:9.1f}",
        flush=True,
    )
    return row


def main() -> None:
    """Quantise and measure every arm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--windows", type=int, default=None, help="at most so many of 1024 tokens")
    parser.add_argument("--rows", type=int, default=64, help="of calibration text, 512 tokens each")
    parser.add_argument("--only", default=",".join(ARMS), help="arms, with commas between")
    parser.add_argument("--work", type=Path, default=Path("build/quantized"))
    args = parser.parse_args()
    data = os.environ.get("TRIMTAB_DATA")
    if not data:
        sys.exit("Set TRIMTAB_DATA to the folder that holds wikitext2/valid.txt.")
    args.work.mkdir(parents=True, exist_ok=True)
    text = calibration(args.work, args.model, rows=args.rows, tokens=512)
    tokenizer = load_model(args.model, device="cpu", dtype="bfloat16").tokenizer
    ids = tokens_of(Path(data) / "wikitext2" / "valid.txt", tokenizer)
    rows = windows(ids, n_windows=args.windows, n_tokens=1024)
    print(f"{len(rows)} windows of 1024 tokens; calibrated on {text.origin}, {args.rows} in all")
    print(f"{'scheme:method':28} {'nll':>8} {'ppl':>8} {'delta':>8} {'file MB':>9} {'RAM MB':>9}")
    table = [measured("bf16", args.model, rows, None)]
    base = table[0]["nll"]
    for arm in args.only.split(","):
        settings = settings_of(arm)
        folder = args.work / arm.replace(":", "-").replace("/", "-").replace("=", "-")
        if not folder.is_dir():
            loaded = load_model(args.model, device="cpu", dtype="bfloat16")
            quantize_model(
                loaded,
                folder,
                settings,
                text=lambda: text,
                text_name=text.digest,
                is_measured=False,
            )
            del loaded
            gc.collect()
        table.append(measured(arm, str(folder), rows, base))
    path = args.work / "perplexity.json"
    path.write_text(json.dumps(table, indent=2), encoding="utf-8")
    print(f"Written to {path}.")


if __name__ == "__main__":
    main()
