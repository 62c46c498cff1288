"""Run one step of the batch through the model: packed when the model allows it, else one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from trimtab.serving.engines.transformers.attention import (
    PackedBatch,
    Segment,
    packed_attention,
)
from trimtab.serving.engines.transformers.kv import KVRows
from trimtab.steering.bank import Bank
from trimtab.steering.model.attention import attention_configs
from trimtab.steering.model.decoder import text_config
from trimtab.steering.model.hooks import steered
from trimtab.steering.model.quantized.linear import exact_products
from trimtab.steering.step import Span, SteerStep
from trimtab.steering.step_planner import StepPlanner


@dataclass(frozen=True)
class Chunk:
    """Some consecutive tokens of one sequence to run.

    Attributes:
        row: the sequence's place in the cache.
        ids: the tokens, at least one.
        start: absolute position of the first.
        span: the same tokens for steering.
        n_logits: how many of the last tokens need logits.
    """

    row: int
    ids: Sequence[int]
    start: int
    span: Span
    n_logits: int


class Runner(Protocol):
    """Runs chunks; keeps the sequences' caches by row."""

    can_chunk: bool
    """Whether a prompt may be run in several pieces."""

    def run(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Return each chunk's logits, `[n_logits, vocab]`."""
        ...

    def free(self, row: int, n_tokens: int, *, is_broken: bool) -> None:
        """Forget a row's sequence of `n_tokens`, whose states may not be finite if it broke."""
        ...

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Let the sequence of `source`, `n_tokens` long, go on in `target`."""
        ...


def _step(planner: StepPlanner, spans: list[Span]) -> SteerStep | None:
    return None if all(span.is_plain for span in spans) else planner.step(spans)


class PackedRunner:
    """All chunks in one forward pass, the tokens of all sequences side by side."""

    can_chunk = True

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module], *, bank: Bank, kv: KVRows
    ) -> None:
        self.model = model
        self.layers = layers
        self.kv = kv
        self._planner = StepPlanner(bank)
        self.device = next(model.parameters()).device
        self._configs = attention_configs(model)

    def run(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Return each chunk's logits; decoding chunks may stand anywhere in the list."""
        order = sorted(range(len(chunks)), key=lambda i: len(chunks[i].ids) > 1)
        ids: list[int] = []
        positions: list[int] = []
        keep: list[int] = []
        rows, lengths, segments = [], [], []
        for i in order:
            chunk = chunks[i]
            begin, n = len(ids), len(chunk.ids)
            if n == 1:
                rows.append(chunk.row)
                lengths.append(chunk.start + 1)
            else:
                segments.append(Segment(chunk.row, begin, begin + n, chunk.start))
            ids.extend(chunk.ids)
            positions.extend(range(chunk.start, chunk.start + n))
            keep.extend(range(begin + n - chunk.n_logits, begin + n))
        batch = PackedBatch(
            self.kv,
            torch.tensor(rows, dtype=torch.int64, device=self.device),
            torch.tensor(lengths, dtype=torch.int64, device=self.device),
            tuple(segments),
        )
        step = _step(self._planner, [chunks[i].span for i in order])
        with packed_attention(self._configs, batch), steered(self.layers, step):
            output = self.model(
                input_ids=torch.tensor([ids], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                use_cache=False,
                logits_to_keep=torch.tensor(keep, dtype=torch.int64, device=self.device),
            )
        if step is not None:
            step.finish()
        logits = output.logits[0]
        if logits.shape[0] != len(keep):
            raise RuntimeError("the model ignores logits_to_keep")
        results: list[torch.Tensor] = [logits] * len(chunks)
        at = 0
        for i in order:
            results[i] = logits[at : at + chunks[i].n_logits]
            at += chunks[i].n_logits
        return results

    def free(self, row: int, n_tokens: int, *, is_broken: bool) -> None:
        """Wipe a broken sequence's row; any other is overwritten by its next sequence."""
        if is_broken:
            self.kv.wipe(row, n_tokens)

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Copy the sequence's keys and values."""
        self.kv.move(source, target, n_tokens)


class SoloRunner:
    """One forward pass a chunk with the model's own cache: for state-space and other models."""

    can_chunk = False

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], *, bank: Bank) -> None:
        self.model = model
        self.layers = layers
        self._planner = StepPlanner(bank)
        self.device = next(model.parameters()).device
        self._caches: dict[int, Any] = {}

    def run(self, chunks: Sequence[Chunk]) -> list[torch.Tensor]:
        """Return each chunk's logits."""
        return [self._run(chunk) for chunk in chunks]

    def _run(self, chunk: Chunk) -> torch.Tensor:
        step = _step(self._planner, [chunk.span])
        inputs: dict[str, Any] = {}
        if chunk.start:
            name, cache = self._caches[chunk.row]
            inputs[name] = cache
        ids = torch.tensor([list(chunk.ids)], device=self.device)
        with steered(self.layers, step):
            output = self.model(input_ids=ids, use_cache=True, **inputs)
        if step is not None:
            step.finish()
        for name in ("past_key_values", "cache_params"):
            if output.get(name) is not None:
                self._caches[chunk.row] = (name, output[name])
                break
        logits: torch.Tensor = output.logits[0]
        return logits[logits.shape[0] - chunk.n_logits :]

    def free(self, row: int, n_tokens: int, *, is_broken: bool) -> None:
        """Drop the sequence's cache."""
        self._caches.pop(row, None)

    def move(self, source: int, target: int, n_tokens: int) -> None:
        """Hand the cache over."""
        self._caches[target] = self._caches.pop(source)


@torch.inference_mode()
def packing_problem(packed: PackedRunner) -> str | None:
    """Return why a model cannot run packed, or None if it gives the model's own numbers.

    Activations are not rounded for it, see `exact_products`.

    Two sequences are prefilled together and decoded one token together, and compared with the
    model run on each alone. This decides by the numbers, not by a list of architectures.
    """
    model, none = packed.model, Span(0)
    vocab = int(text_config(model).vocab_size)
    ids = [[(11 * i + 3 * j) % vocab for i in range(1, 9 + 4 * j)] for j in range(2)]
    with exact_products(model):
        try:
            prefill = packed.run([Chunk(j, x[:-1], 0, none, 1) for j, x in enumerate(ids)])
            decode = packed.run([Chunk(j, x[-1:], len(x) - 1, none, 1) for j, x in enumerate(ids)])
        except Exception as error:  # any model may fail in its own way; the reason is reported
            return f"{type(error).__name__}: {error}".splitlines()[0][:200]
        alone = [model(input_ids=torch.tensor([x], device=packed.device)).logits[0] for x in ids]
    for j in range(len(ids)):
        own = alone[j][-2:].float()
        ours = torch.cat([prefill[j], decode[j]]).float()
        apart = float((ours - own).pow(2).mean().sqrt() / own.std().clamp_min(1e-6))
        bound = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
        if not apart < bound:
            return f"packed logits differ from the model's own by {apart:.2g} of their spread"
    return None
