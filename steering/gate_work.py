"""Gates that are read in a forward pass, and the decisions of those that read token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.kernels import Classifier, probabilities, read
from trimtab.steering.plan import Gate, Reader
from trimtab.steering.steered_request import SteeredRequest


@dataclass(frozen=True)
class Reading:
    """A gate of one request that is read in this pass.

    Attributes:
        gate: the gate.
        tokens: the pass's tokens it is read at.
        part: index of the part it holds for.
        request: whose it is.
        start: absolute position of the first token.
    """

    gate: Gate
    tokens: slice
    part: int
    request: SteeredRequest
    start: int


@dataclass(frozen=True, eq=False)
class Decision:
    """Token gates that read one classifier: decided in one go, whatever their labels and bounds.

    Attributes:
        reader: what they read.
        index: tokens, `[n]`, int64; one that two gates read is there twice.
        parts: the part each holds for, `[n]`, int64.
        labels: label each asks for, `[n, 1]`, int64.
        thresholds: probability at which each switches, `[n]`, float32.
        above: whether it is open above it, `[n]`, bool.
    """

    reader: Reader
    index: torch.Tensor
    parts: torch.Tensor
    labels: torch.Tensor
    thresholds: torch.Tensor
    above: torch.Tensor

    def take(self, hidden: torch.Tensor, network: Classifier, gates: torch.Tensor) -> None:
        """Write what the gates decide at a layer's output.

        Args:
            hidden: the pass's hidden states, `[n_tokens, d_model]`.
            network: the reader's, on their device.
            gates: of each token and part, `[n_tokens, n_parts]`, float32; written to.
        """
        logits = read(hidden.index_select(0, self.index), network)
        score = probabilities(logits, network).gather(1, self.labels).squeeze(1)
        is_open = torch.where(self.above, score > self.thresholds, score < self.thresholds)
        gates[self.index, self.parts] = is_open.to(gates.dtype)


def decisions(readings: Sequence[Reading], device: torch.device) -> list[Decision]:
    """Return what a layer's token gates decide; gates of a whole prompt are left out."""
    alike: dict[str, list[Reading]] = {}
    for reading in readings:
        if not reading.gate.per_prompt:
            alike.setdefault(reading.gate.reader.digest, []).append(reading)
    return [_decision(group, device) for group in alike.values()]


def _decision(readings: Sequence[Reading], device: torch.device) -> Decision:
    gates = [reading.gate for reading in readings]
    index = [np.arange(reading.tokens.start, reading.tokens.stop) for reading in readings]
    counts = [len(tokens) for tokens in index]

    def of_each(values: Sequence[float], dtype: type[np.generic]) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype), counts)).to(device)

    return Decision(
        reader=gates[0].reader,
        index=torch.from_numpy(np.concatenate(index).astype(np.int64)).to(device),
        parts=of_each([reading.part for reading in readings], np.int64),
        labels=of_each([gate.label for gate in gates], np.int64).unsqueeze(1),
        thresholds=of_each([gate.threshold for gate in gates], np.float32),
        above=of_each([gate.above for gate in gates], np.bool_),
    )
