"""The networks that live requests read or follow, each on the device once."""

from __future__ import annotations

import torch

from trimtab.kernels import Classifier
from trimtab.steering.plan import Reader


class ReaderShelf:
    """Networks by digest, with reference counts.

    Args:
        device: where they are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[str, tuple[Classifier, int]] = {}

    def __len__(self) -> int:
        """Networks held."""
        return len(self._held)

    def hold(self, reader: Reader) -> None:
        """Keep a reader's network until it is dropped as often as it was held."""
        known = self._held.get(reader.digest)
        network = reader.classifier.to(self._device) if known is None else known[0]
        self._held[reader.digest] = (network, 1 if known is None else known[1] + 1)

    def drop(self, reader: Reader) -> None:
        """Let go of a reader's network once."""
        network, count = self._held.pop(reader.digest)
        if count > 1:
            self._held[reader.digest] = (network, count - 1)

    def of(self, reader: Reader) -> Classifier:
        """Return a held reader's network on the device."""
        return self._held[reader.digest][0]
