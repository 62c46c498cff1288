"""Do vectors survive quantisation? Built on the plain model and on the quantised one, side by side.

    trimtab quantize smollm2 --scheme nvfp4 --out smollm2-nvfp4
    python benchmarks/quantized_vectors.py smollm2 smollm2-nvfp4              # four concepts
    python benchmarks/quantized_vectors.py smollm2 smollm2-nvfp4 warm formal --json out.json

For each concept a vector is built and calibrated on either model from the same pairs. Told are the
cosine of the two directions layer by layer, the layers and the relative dose that calibration chose
on either, and what each vector does at scale 1 on each model: the rise of the held pairs' margin in
nats a token and the rise of perplexity on WikiText-2's validation text (TRIMTAB_DATA).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from vector_effect import plan_of

from trimtab.steering.model.loading import load_model
from trimtab.steering.model.profile import profile_model
from trimtab.steering.vector import VectorArtifact
from trimtab.training.scoring import answer_logprobs, answer_of, perplexity
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.build import build_vector
from trimtab.training.vectors.pairs import concept

CONCEPTS = ("optimistic", "formal", "warm", "concise")
N_TEXT_TOKENS = 4096


def host_of(model: str, dtype: str) -> SteeredModel:
    """Return a model to build and measure on."""
    loaded = load_model(model, dtype=dtype)
    profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
    return SteeredModel(loaded, profile)


def effect(
    host: SteeredModel, vector: VectorArtifact, name: str, text: list[int]
) -> dict[str, float]:
    """Return what a vector does at scale 1: `margin`, nats a token, and `rise` of perplexity."""
    answers = [
        answer_of(host.tokenizer, pair.prompt, side)
        for pair in concept(name).held
        for side in (pair.preferred, pair.dispreferred)
    ]

    def measured(scale: float) -> tuple[float, float]:
        plan = plan_of(vector, scale)
        scores = answer_logprobs(host, answers, plan=plan)
        damage = perplexity(host, text, plan=plan) if text else float("nan")
        return float((scores[0::2] - scores[1::2]).mean()), damage

    (margin, before), (steered, after) = measured(0.0), measured(1.0)
    return {"margin": steered - margin, "rise": after / before - 1}


def compared(
    plain: SteeredModel, quantized: SteeredModel, name: str, text: list[int]
) -> dict[str, Any]:
    """Return one concept's row."""
    hosts = {"plain": plain, "quantized": quantized}
    vectors = {where: build_vector(host, concept(name), id=name) for where, host in hosts.items()}
    cosines = torch.cosine_similarity(
        vectors["plain"].directions.float(), vectors["quantized"].directions.float(), dim=1
    )
    chosen = list(vectors["plain"].default_layers)
    return {
        "concept": name,
        "cosine": {
            "median": float(cosines.median()),
            "least": float(cosines.min()),
            "at_chosen": float(cosines[chosen].mean()),
        },
        "chosen": {
            where: {
                "layers": list(vector.default_layers),
                "dose": vector.calibration["knee"]["dose"] if vector.calibration else None,
            }
            for where, vector in vectors.items()
        },
        "effect": {
            f"{built} on {where}": effect(host, vector, name, text)
            for built, vector in vectors.items()
            for where, host in hosts.items()
        },
    }


def text_ids(tokenizer: Any) -> list[int]:
    """Return the text that damage is measured on; none without TRIMTAB_DATA."""
    place = Path(os.environ.get("TRIMTAB_DATA", "")) / "wikitext2" / "valid.txt"
    if not os.environ.get("TRIMTAB_DATA") or not place.exists():
        print("no TRIMTAB_DATA with wikitext2: perplexity is left out", file=sys.stderr)
        return []
    raw = place.read_text(encoding="utf-8")[: N_TEXT_TOKENS * 8]
    ids: list[int] = tokenizer(raw, verbose=False)["input_ids"]
    return ids[:N_TEXT_TOKENS]


def main() -> None:
    """Build, compare, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plain", help="the model")
    parser.add_argument("quantized", help="the folder that `trimtab quantize` made of it")
    parser.add_argument("concepts", nargs="*", help=f"default: {', '.join(CONCEPTS)}")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    plain, quantized = host_of(args.plain, args.dtype), host_of(args.quantized, args.dtype)
    text = text_ids(plain.tokenizer)
    rows = []
    for name in args.concepts or CONCEPTS:
        row = compared(plain, quantized, name, text)
        rows.append(row)
        cosine = row["cosine"]
        print(
            f"{name}: cosine median {cosine['median']:.3f}, least {cosine['least']:.3f}, "
            f"at the chosen layers {cosine['at_chosen']:.3f}"
        )
        for where, knee in row["chosen"].items():
            print(f"  calibrated on {where}: layers {knee['layers']}, dose {knee['dose']:.3f}")
        for what, numbers in row["effect"].items():
            print(f"  {what}: margin {numbers['margin']:+.3f}, perplexity {numbers['rise']:+.1%}")
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
