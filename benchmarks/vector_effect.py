"""What the bundled vectors do on held-out pairs, and what they cost.

    python benchmarks/vector_effect.py                        # all concepts, about half an hour
    python benchmarks/vector_effect.py warm --method pca      # one, another method

For each concept a vector is built and calibrated on its build pairs; then, on the held third that
building never reads: the share of prompts whose margin (mean log-probability a token of the
preferred answer minus the dispreferred one's) moves toward preferred at scale 1, and the mean
margin at each scale. Damage is perplexity of WikiText-2's validation text (first 8192 tokens,
taken from `wikitext2/valid.txt` in TRIMTAB_DATA), steered against unsteered.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trimtab.steering.model.loading import load_model
from trimtab.steering.model.paths import data_home
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import Plan, additive_plan
from trimtab.steering.store import Store, model_folder
from trimtab.steering.vector import VectorArtifact
from trimtab.training.scoring import answer_logprobs, answer_of, perplexity
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.activations import parse_position
from trimtab.training.vectors.build import build_vector
from trimtab.training.vectors.pairs import concept, concepts

SCALES = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
N_TEXT_TOKENS = 8192


def plan_of(vector: VectorArtifact, scale: float) -> Plan | None:
    """Return what a request with this scale and no other field would apply."""
    if scale == 0.0:
        return None
    rows = {layer: vector.row(layer) * scale for layer in vector.default_layers}
    return additive_plan(rows, normalize=vector.normalize)


def measure(host: SteeredModel, vector: VectorArtifact, name: str, text: list[int]) -> Any:
    """Return one concept's row: per scale the margin, the share moved and the perplexity."""
    answers = [
        answer_of(host.tokenizer, pair.prompt, side)
        for pair in concept(name).held
        for side in (pair.preferred, pair.dispreferred)
    ]
    margins, perplexities = {}, {}
    for scale in SCALES:
        plan = plan_of(vector, scale)
        scores = answer_logprobs(host, answers, plan=plan)
        margins[scale] = scores[0::2] - scores[1::2]
        if text and abs(scale) != 0.5:
            perplexities[scale] = perplexity(host, text, plan=plan)
    means = {scale: float(m.mean()) for scale, m in margins.items()}
    inner = [means[s] for s in SCALES if abs(s) <= 1.0]
    return {
        "concept": name,
        "method": vector.method,
        "position": vector.settings.get("position"),
        "normalize": vector.normalize,
        "layers": list(vector.default_layers),
        "dose": vector.calibration["knee"]["dose"] if vector.calibration else None,
        "n_held": len(margins[0.0]),
        "moved": float((margins[1.0] > margins[0.0]).float().mean()),
        "is_monotone": all(b > a for a, b in itertools.pairwise(inner)),
        "margin": means,
        "perplexity": perplexities,
        "rise": {s: p / perplexities[0.0] - 1.0 for s, p in perplexities.items()},
    }


def main() -> None:
    """Build, measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("concepts", nargs="*", help=f"default all: {', '.join(concepts())}")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--method", default="mean_difference")
    parser.add_argument("--position", default="mean")
    parser.add_argument("--normalize", action="store_true")
    parser.add_argument("--stored", action="store_true", help="take vectors from the store")
    parser.add_argument("--save", action="store_true", help="put the built vectors into the store")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    loaded = load_model(args.model, dtype=args.dtype)
    profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
    host = SteeredModel(loaded, profile)
    store = Store(model_folder(data_home(), loaded.id))
    text: list[int] = []
    place = Path(os.environ.get("TRIMTAB_DATA", "")) / "wikitext2" / "valid.txt"
    if os.environ.get("TRIMTAB_DATA") and place.exists():
        raw = place.read_text(encoding="utf-8")[: N_TEXT_TOKENS * 8]
        text = loaded.tokenizer(raw, verbose=False)["input_ids"][:N_TEXT_TOKENS]
    else:
        print("no TRIMTAB_DATA with wikitext2: perplexity is left out", file=sys.stderr)
    rows = []
    for name in args.concepts or concepts():
        begin = time.perf_counter()
        if args.stored:
            vector = store.vector(name)
        else:
            vector = build_vector(
                host,
                concept(name),
                id=name,
                method=args.method,
                position=parse_position(args.position),
                normalize=args.normalize,
            )
            if args.save:
                store.put_vector(vector)
        built = time.perf_counter() - begin
        rows.append({**measure(host, vector, name, text), "build_seconds": round(built, 1)})
        print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)

    # From the vectors, not from the arguments: stored ones may have been built another way.
    how = " ".join(
        f"{key}={','.join(sorted({str(row[key]) for row in rows}))}"
        for key in ("method", "position", "normalize")
    )
    print(
        f"model={loaded.id} dtype={loaded.dtype} {how} torch={torch.__version__} "
        f"text_tokens={len(text)}"
    )
    damaged = (-1.0, 1.0, 2.0, 4.0)
    heads = [f"m({s:g})" for s in SCALES] + [f"ppl({s:g})" for s in damaged]
    print(
        f"{'concept':<12}{'layers':<12}{'dose':>6}{'moved':>7}" + "".join(f"{h:>9}" for h in heads)
    )
    for row in rows:
        layers = row["layers"]
        span = f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
        cells = [f"{row['margin'][s]:>+9.3f}" for s in SCALES]
        cells += [f"{row['rise'][s]:>+9.1%}" if text else f"{'':>9}" for s in damaged]
        mark = "" if row["is_monotone"] else "  not monotone"
        dose = row["dose"] or 0.0
        print(
            f"{row['concept']:<12}{span:<12}{dose:>6.3f}{row['moved']:>7.0%}"
            + "".join(cells)
            + mark
        )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
