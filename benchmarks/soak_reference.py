"""What transformers makes of a request alone, for `vllm_soak.py` to compare with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from trimtab.steering.model.loading import load_model
from trimtab.steering.model.profile import profile_model
from trimtab.steering.plan import Gate, Guide, LayerTerm, Part, Plan, Reader, fingerprint_of
from trimtab.training.steered_model import SteeredModel

TIE = 1e-3
DISTURBANCE = 1e-5
_TRIES = 16


@dataclass(frozen=True)
class Finished:
    """A greedy request and what it got."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    plan: Plan | None


def compared(model: str, finished: Sequence[Finished]) -> dict[str, Any]:
    """Compare answers with the float32 reference, token by token, each in a pass of its own.

    Returns:
        `answers` and `tokens` compared, `exact` answers, those with a `near_tie` (and the largest
        margin among them), those the reference gives when `disturbed`, and the `wrong` ones.
    """
    loaded = load_model(model, device="cpu", dtype="float32")
    profile = profile_model(loaded.model, model_id=loaded.id, tokenizer=loaded.tokenizer)
    reference = SteeredModel(loaded, profile)
    counts: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    largest, wrong = 0.0, []
    for number, one in enumerate(finished):
        if not one.answer_ids:
            continue
        margins = _margins(reference, one, one.plan)
        counts["answers"] += 1
        counts["tokens"] += len(margins)
        kinds.update(_kinds(one.plan))
        worst = max(margins)
        largest = max(largest, *(m for m in margins if m <= TIE))
        if worst == 0:
            counts["exact"] += 1
        elif worst <= TIE:
            counts["near_tie"] += 1
        elif _is_on_the_edge(reference, one, margins):
            counts["disturbed"] += 1
        else:
            wrong.append(_account(number, one, margins))
    names = ("answers", "tokens", "exact", "near_tie", "disturbed")
    return {name: counts[name] for name in names} | {
        "largest_tie_margin": largest,
        "kinds": dict(kinds),
        "wrong": wrong,
    }


@torch.inference_mode()
def _margins(reference: SteeredModel, one: Finished, plan: Plan | None) -> list[float]:
    """Return by how much each answer's token is less likely than the likeliest; 0 if it is that."""
    ids = [*one.prompt_ids, *one.answer_ids[:-1]]
    with reference.under(plan, n_rows=1, n_tokens=len(ids), n_prompt=len(one.prompt_ids)):
        logits = reference.model(torch.tensor([ids]), use_cache=False).logits[0].float()
    logits = logits[len(one.prompt_ids) - 1 :]
    chosen = logits.gather(1, torch.tensor(one.answer_ids).unsqueeze(1))[:, 0]
    margins = (logits.amax(1) - chosen).tolist()
    return [float(margin) if math.isfinite(margin) else math.inf for margin in margins]


def _is_on_the_edge(reference: SteeredModel, one: Finished, margins: list[float]) -> bool:
    """Return whether each wrong token is right under some disturbance of the plan."""
    if one.plan is None:
        return False
    open_places = {i for i, margin in enumerate(margins) if margin > TIE}
    for seed in range(_TRIES):
        found = _margins(reference, one, _disturbed(one.plan, seed))
        open_places -= {i for i, margin in enumerate(found) if margin <= TIE}
        if not open_places:
            return True
    return False


def _disturbed(plan: Plan, seed: int) -> Plan:
    generator = torch.Generator().manual_seed(seed)

    def moved(value: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(value.shape, generator=generator)
        return value + DISTURBANCE * noise * value.abs().clamp_min(1e-3)

    def reader(one: Reader) -> Reader:
        network = replace(one.classifier, b_in=moved(one.classifier.b_in))
        return replace(one, classifier=network, digest=f"{one.digest} {seed}")

    def gate(one: Gate | None) -> Gate | None:
        if one is None:
            return None
        shift = DISTURBANCE * (1 if seed % 2 else -1)
        return replace(one, reader=reader(one.reader), threshold=one.threshold + shift)

    def term(one: LayerTerm) -> LayerTerm:
        guides: tuple[Guide, ...] = tuple(
            replace(guide, reader=reader(guide.reader)) for guide in one.guides
        )
        return replace(one, add=None if one.add is None else moved(one.add), guides=guides)

    parts = tuple(
        Part.of(part.window, gate(part.gate), {n: term(t) for n, t in part.layers.items()})
        for part in plan.parts
    )
    return Plan(parts, fingerprint_of(parts), plan.prompt_fingerprint)


def _kinds(plan: Plan | None) -> list[str]:
    """Say what a plan is made of, for the count of what was compared."""
    if plan is None or not plan.parts:
        return ["plain"]
    terms = [term for part in plan.parts for term in part.layers.values()]
    gates = [part.gate for part in plan.parts if part.gate is not None]
    found = {
        "added": any(term.add is not None for term in terms),
        "ablated": any(term.low_a is not None for term in terms),
        "guided": any(term.guides for term in terms),
        "norm kept": any(term.normalize for term in terms),
        "gate a token": any(not gate.per_prompt for gate in gates),
        "gate a prompt": any(gate.per_prompt for gate in gates),
        "window": any(not part.window.everywhere for part in plan.parts),
        "parts > 1": len(plan.parts) > 1,
    }
    return [name for name, has in found.items() if has]


def _account(number: int, one: Finished, margins: list[float]) -> dict[str, Any]:
    first = next(i for i, margin in enumerate(margins) if margin > TIE)
    return {
        "answer": number,
        "kinds": _kinds(one.plan),
        "n_prompt": len(one.prompt_ids),
        "n_answer": len(one.answer_ids),
        "first_wrong_token": first,
        "margin": round(margins[first], 4),
        "n_wrong_tokens": sum(margin > TIE for margin in margins),
    }
