"""Load a language model and its tokenizer, and say why on this device and in this precision."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimtab.steering.errors import ModelLoadError, did_you_mean, listed
from trimtab.steering.model.conversion import quiet_transformers
from trimtab.steering.model.default import DEFAULT_MODEL_ID, ensure_default_model
from trimtab.steering.model.precision import cpu_dtype
from trimtab.steering.model.quantized.facts import QuantizationFacts
from trimtab.steering.model.quantized.folder import QuantizedFolder, is_quantized, read_folder

_NEEDED = ["*.json", "*.safetensors"]  # of a quantised model, beside its tokenizer
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with what was decided on the way.

    Attributes:
        model: the transformers model, in eval mode, no parameter requiring gradients.
        tokenizer: its tokenizer.
        id: the name it is served under: `smollm2`, the folder's name or the Hugging Face id.
        source_path: the folder it was read from; None if Hugging Face's cache does not say.
        device: where its parameters are.
        dtype: the type of its floating-point parameters.
        reasons: one sentence for each choice made, under `model`, `device` and `dtype`, and under
            `weights` if they are quantised.
        quantization: how the weights were quantised; None if they were not.
    """

    model: Any
    tokenizer: Any
    id: str
    source_path: Path | None
    device: torch.device
    dtype: torch.dtype
    reasons: dict[str, str]
    quantization: QuantizationFacts | None = None


def load_model(
    model: str, *, device: str = "auto", dtype: str = "auto", revision: str | None = None
) -> LoadedModel:
    """Load a causal language model; code that comes with a checkpoint is never run.

    Args:
        model: `smollm2`, a local folder in Hugging Face's layout, or a Hugging Face id.
        device: `auto` (the first there is of cuda, mps, cpu) or a torch device such as `cuda:1`.
        dtype: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own on an accelerator,
            and on a CPU bfloat16 if a measurement finds it faster than float32.
        revision: branch, tag or commit of a Hugging Face id.

    Raises:
        ModelLoadError: the model cannot be found, read or placed as asked, has weights missing,
            or is no decoder-only language model.
    """
    on_device, device_reason = _device(device)
    in_dtype, dtype_reason = _dtype(dtype, device=on_device)
    name, source, model_reason = located(model, revision=revision)
    with _bars_where_seen(model):
        try:
            loaded, tokenizer, quantized = _read(
                source, revision=revision, device=on_device, dtype=in_dtype
            )
        except ModelLoadError:
            raise
        # A checkpoint is foreign data read by a foreign library over a network: anything can come.
        except Exception as error:
            raise ModelLoadError(
                f"The model {model!r} cannot be loaded: {_in_short(error)}"
                f"{did_you_mean(model, [DEFAULT_MODEL_ID])} Give {DEFAULT_MODEL_ID!r}, "
                "a local folder, or a Hugging Face id."
            ) from error
    loaded.eval().requires_grad_(False)
    facts, weights_reason = quantized or (None, "")
    return LoadedModel(
        model=loaded,
        tokenizer=tokenizer,
        id=name,
        source_path=_folder_of(source, revision=revision),
        device=on_device,
        dtype=loaded.dtype,
        reasons={
            "model": model_reason,
            "device": device_reason,
            "dtype": dtype_reason or f"{_plain(loaded.dtype)}, the checkpoint's own.",
            **({"weights": weights_reason} if weights_reason else {}),
        },
        quantization=facts,
    )


def _device(asked: str) -> tuple[torch.device, str]:
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if asked == "auto":
        if has_cuda:
            return torch.device("cuda"), f"cuda, because there is a {torch.cuda.get_device_name()}."
        if has_mps:
            return torch.device("mps"), "mps, because there is no CUDA GPU but Apple's is there."
        return torch.device("cpu"), "cpu, because no GPU that torch can use was found."
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ModelLoadError(
            f"{asked!r} is no device. Allowed: auto, cpu, cuda, cuda:N, mps."
        ) from None
    known = {"cpu": 1, "cuda": torch.cuda.device_count() if has_cuda else 0, "mps": int(has_mps)}
    if (device.index or 0) >= known.get(device.type, 0):
        there = [f"{kind} ({count})" for kind, count in known.items() if count]
        raise ModelLoadError(
            f"The device {asked!r} is not there: torch sees {listed(there)}. Allowed also: auto."
        )
    return device, f"{asked}, as asked."


def _dtype(asked: str, *, device: torch.device) -> tuple[torch.dtype | None, str]:
    """Return the type to load in and why; None and "" mean the checkpoint's own."""
    if asked in DTYPES:
        return DTYPES[asked], f"{asked}, as asked."
    if asked != "auto":
        raise ModelLoadError(
            f"{asked!r} is no dtype for a model.{did_you_mean(asked, DTYPES)} "
            f"Allowed: auto, {listed(DTYPES)}."
        )
    return cpu_dtype() if device.type == "cpu" else (None, "")


def located(model: str, *, revision: str | None = None) -> tuple[str, str, str]:
    """Find a model: its public name, what transformers is given, and why that.

    Raises:
        ModelLoadError: there is nothing of that name here, or it is no model.
    """
    if not model:
        raise ModelLoadError(
            f"No model was named. Give {DEFAULT_MODEL_ID!r}, a local folder, or a Hugging Face id."
        )
    path = Path(model).expanduser()
    is_default = model == DEFAULT_MODEL_ID
    if (is_default or path.is_dir()) and revision is not None:
        raise ModelLoadError(
            f"{model!r} is local and has no revision {revision!r}: leave the revision out."
        )
    if is_default:
        folder = ensure_default_model()
        return model, str(folder), f"{model}: the default model, in {folder}."
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelLoadError(f"The folder {model!r} holds no config.json: it is no model.")
        return path.resolve().name, str(path), f"the local folder {path.resolve()}."
    if path.is_file():
        raise ModelLoadError(f"{model!r} is a file; give the folder of a Hugging Face checkpoint.")
    # A Hugging Face id is a name or owner/name; what else looks like a path is a missing folder.
    if model.startswith((".", "~", "/")) or model.count(os.sep) > 1:
        raise ModelLoadError(f"There is no folder {model!r}.")
    at = f" at {revision}" if revision else ""
    return model, model, f"{model}{at}, a Hugging Face id (there is no local folder of that name)."


def _read(
    source: str, *, revision: str | None, device: torch.device, dtype: torch.dtype | None
) -> tuple[Any, Any, tuple[QuantizationFacts, str] | None]:
    """Return model, tokenizer, and how the weights are quantised and what became of them."""
    from transformers import AutoConfig, AutoTokenizer

    # trust_remote_code is said aloud because leaving it out makes transformers ask on a terminal.
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
    config = AutoConfig.from_pretrained(source, **options)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    folder = _quantized_folder(source, config, revision=revision)
    quantized: tuple[QuantizationFacts, str] | None = None
    if folder is None:
        loaded, facts = loader_for(config).from_pretrained(
            source,
            config=config,
            dtype="auto" if dtype is None else dtype,
            # Straight onto the device, so that a model larger than the machine's memory fits.
            device_map=None if device.type == "cpu" else {"": device},
            output_loading_info=True,
            **options,
        )
    else:
        from trimtab.steering.model.quantized.load import load_quantized

        own = getattr(config.get_text_config(decoder=True), "dtype", None) or config.dtype
        loaded, facts, reason = load_quantized(
            folder,
            model_class=loader_for(config)._model_mapping[type(config)],
            config=config,
            device=device,
            dtype=dtype or own or torch.bfloat16,
        )
        quantized = folder.facts, reason
    # transformers fills what a checkpoint lacks with random numbers and goes on.
    if facts["missing_keys"]:
        raise ModelLoadError(
            f"The checkpoint {source!r} lacks {len(facts['missing_keys'])} weights of its "
            f"architecture: {listed(facts['missing_keys'], most=3)}. It is incomplete or not a "
            f"{type(loaded).__name__}."
        )
    return loaded, tokenizer, quantized


def _quantized_folder(source: str, config: Any, *, revision: str | None) -> QuantizedFolder | None:
    """Return the folder of a model that is quantised in a way that we load ourselves."""
    if not is_quantized(vars(config)):
        return None
    path = Path(source).expanduser()
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(source, revision=revision, allow_patterns=_NEEDED))
    return read_folder(path)


def loader_for(config: Any) -> Any:
    """Return the auto class for this configuration: text first, else text with images."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText
    raise ModelLoadError(
        f"A {config.model_type!r} model is no decoder-only language model. "
        "trimtab steers what AutoModelForCausalLM or AutoModelForImageTextToText can load."
    )


def _bars_where_seen(model: str) -> AbstractContextManager[None]:
    """Keep transformers' bars off a log file, and off the default model, which is quick."""
    is_wanted = sys.stderr.isatty() and model != DEFAULT_MODEL_ID
    return nullcontext() if is_wanted else quiet_transformers()


def _folder_of(source: str, *, revision: str | None) -> Path | None:
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _in_short(error: Exception) -> str:
    """Return the first two lines of what a library said, as a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
