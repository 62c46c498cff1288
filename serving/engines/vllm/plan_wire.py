"""A plan as plain values, to travel with its request into vLLM's workers.

A request carries its whole steering, so that workers hold no registry that could be out of date:
vectors change without their knowing. Only classifiers' networks, megabytes each, are put there
once and named by digest. Bytes are little-endian float32; nothing is ever unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trimtab.kernels import Classifier
from trimtab.steering.plan import Gate, Guide, LayerTerm, Part, Plan, Reader, fingerprint_of
from trimtab.steering.window import Window

KEY = "trimtab"
"""Where a request's `extra_args` holds its steering."""

ASKED = "steering"
"""Where a client of plain vLLM puts it, as `vllm_xargs`; it must be compiled before the engine."""

PRESET = "steering_preset"
"""Where such a client names a preset, whose terms come before those of `ASKED`."""

_NETWORK = ("w_in", "b_in", "gram", "w_mid", "b_mid", "w_out", "b_out")

NetworkOf = Callable[[str], Classifier]
"""Finds a network by its reader's digest; KeyError if the worker does not have it."""


@dataclass(frozen=True, eq=False)
class Carried:
    """What a request brings to a worker.

    Attributes:
        plan: its steering; None if it only reads.
        probes: what to read at every generated token.
        marks: token ids that open and close a thinking span; None if nothing depends on them.
        measures: report the |h| of each layer instead of steering.
    """

    plan: Plan | None
    probes: tuple[Reader, ...]
    marks: tuple[int, int] | None = None
    measures: bool = False


class PackedRequest(dict[str, Any]):
    """What `packed_request` made in this process; what a client sends is a plain dict."""


def packed_request(
    plan: Plan | None,
    probes: tuple[Reader, ...] = (),
    *,
    marks: tuple[int, int] | None = None,
    measures: bool = False,
) -> PackedRequest:
    """Return what a request's `extra_args[KEY]` must be.

    Args:
        plan: its steering.
        probes: what to read at every generated token.
        marks: token ids that open and close a thinking span, if the plan tells them apart.
        measures: report the |h| of each layer instead of steering.
    """
    carried = PackedRequest(probes=[_reader(probe) for probe in probes])
    if marks is not None:
        carried["marks"] = list(marks)
    if measures:
        carried["measures"] = True
    if plan is not None:
        carried["parts"] = [_part(part) for part in plan.parts]
        carried["fingerprint"] = plan.fingerprint
        carried["prompt_fingerprint"] = plan.prompt_fingerprint
        carried["cache"] = _cache_rule(plan)
    return carried


def _cache_rule(plan: Plan) -> dict[str, Any]:
    """Return how the prefix cache must tell this plan's blocks from others'.

    `salt` goes into every block: what a plan does to prompt tokens, or None if it leaves them
    alone. `answer` goes into blocks that hold generated tokens, where those are treated unlike a
    prompt's: the same text would have other keys and values as part of a later prompt. `alone`
    shares nothing, because a gate that reads the whole prompt may decide differently for two
    prompts with a common beginning.
    """
    is_uniform = all(part.window.everywhere for part in plan.parts)
    return {
        "salt": plan.prompt_fingerprint,
        "answer": None if is_uniform or not plan.parts else plan.fingerprint,
        "alone": plan.needs_whole_prompt,
    }


def unpacked_request(carried: Mapping[str, Any], network_of: NetworkOf) -> Carried:
    """Return what `packed_request` packed.

    Raises:
        KeyError: a network is not there, or a field is missing.
        ValueError, TypeError: a field is not what it must be.
    """
    plan = None
    if "parts" in carried:
        parts = tuple(_read_part(part, network_of) for part in carried["parts"])
        plan = Plan(parts, fingerprint_of(parts), carried["prompt_fingerprint"])
        if plan.fingerprint != carried["fingerprint"]:
            raise ValueError("the steering that arrived is not the one that was sent")
    probes = tuple(_read_reader(probe, network_of) for probe in carried["probes"])
    marks = carried.get("marks")
    return Carried(
        plan,
        probes,
        marks=None if marks is None else (int(marks[0]), int(marks[1])),
        measures=bool(carried.get("measures")),
    )


def readers_of(plan: Plan | None, probes: tuple[Reader, ...]) -> dict[str, Reader]:
    """Return every reader that a request needs, by digest."""
    found = {probe.digest: probe for probe in probes}
    for part in plan.parts if plan is not None else ():
        if part.gate is not None:
            found[part.gate.reader.digest] = part.gate.reader
        for term in part.layers.values():
            found.update({guide.reader.digest: guide.reader for guide in term.guides})
    return found


def packed_network(network: Classifier) -> dict[str, Any]:
    """Return a classifier as plain values."""
    tensors = {name: getattr(network, name) for name in _NETWORK}
    return {
        "is_exclusive": network.is_exclusive,
        "tensors": {name: _tensor(t) for name, t in tensors.items() if t is not None},
    }


def unpacked_network(packed: Mapping[str, Any]) -> Classifier:
    """Return what `packed_network` packed."""
    tensors = {name: _read_tensor(value) for name, value in packed["tensors"].items()}
    return Classifier(is_exclusive=packed["is_exclusive"], **tensors)


def _tensor(tensor: torch.Tensor) -> list[Any]:
    array = tensor.detach().cpu().float().contiguous().numpy()
    return [list(array.shape), array.tobytes()]


def _read_tensor(value: Any) -> torch.Tensor:
    shape, data = value
    array = np.frombuffer(data, dtype="<f4").reshape(shape)
    return torch.from_numpy(array.copy())


def _part(part: Part) -> dict[str, Any]:
    window, gate = part.window, part.gate
    return {
        "window": [window.prompt, window.generation, window.thinking, window.first, window.after],
        "gate": None if gate is None else _gate(gate),
        "layers": {str(layer): _term(term) for layer, term in part.layers.items()},
    }


def _read_part(packed: Mapping[str, Any], network_of: NetworkOf) -> Part:
    # Its digest is computed anew: in the bank, parts with the same one share a slot.
    gate = packed["gate"]
    return Part.of(
        Window(*packed["window"]),
        None if gate is None else _read_gate(gate, network_of),
        {int(n): _read_term(term, network_of) for n, term in packed["layers"].items()},
    )


def _gate(gate: Gate) -> list[Any]:
    rule = [gate.label, gate.threshold, gate.above, gate.per_prompt]
    return [gate.probe, _reader(gate.reader), *rule]


def _read_gate(packed: list[Any], network_of: NetworkOf) -> Gate:
    probe, reader, *rule = packed
    return Gate(probe, _read_reader(reader, network_of), *rule)


def _reader(reader: Reader) -> list[Any]:
    return [reader.id, reader.layer, list(reader.labels), reader.digest]


def _read_reader(packed: list[Any], network_of: NetworkOf) -> Reader:
    name, layer, labels, digest = packed
    return Reader(name, layer, network_of(digest), tuple(labels), digest)


def _term(term: LayerTerm) -> dict[str, Any]:
    tensors = {name: getattr(term, name) for name in ("add", "low_a", "low_b")}
    packed: dict[str, Any] = {n: _tensor(t) for n, t in tensors.items() if t is not None}
    if term.normalize:
        packed["normalize"] = True
    if term.guides:
        packed["guides"] = [_guide(guide) for guide in term.guides]
    return packed


def _read_term(packed: Mapping[str, Any], network_of: NetworkOf) -> LayerTerm:
    tensors = {n: _read_tensor(packed[n]) for n in ("add", "low_a", "low_b") if n in packed}
    return LayerTerm(
        **tensors,
        normalize=bool(packed.get("normalize")),
        guides=tuple(_read_guide(guide, network_of) for guide in packed.get("guides", ())),
    )


def _guide(guide: Guide) -> list[Any]:
    labels = [list(guide.toward), list(guide.away), list(guide.sizes)]
    rule = [guide.loss, guide.step, guide.picks_rival, guide.until, guide.keeps_norm]
    return [_reader(guide.reader), *labels, *rule]


def _read_guide(packed: list[Any], network_of: NetworkOf) -> Guide:
    reader, toward, away, sizes, *rule = packed
    return Guide(_read_reader(reader, network_of), tuple(toward), tuple(away), tuple(sizes), *rule)
