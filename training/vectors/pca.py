"""First principal component, with its sign fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.decomposition import PCA as SkPCA

from trimtab.steering.errors import DataError

PAIRINGS = ("center", "diff", "alternate")


@dataclass(frozen=True)
class PCA:
    """The first principal component of the pairs, turned toward the preferred side.

    Options:
        pairing: `center` takes each side minus the pair's midpoint; `diff` the differences
            (centred by PCA, so their mean is lost); `alternate` differences with alternating
            sign, whose mean is about zero.

    Source: representation reading, arXiv 2310.01405, section 3.1, and
    andyzoujm/representation-engineering@5455d8a repe/rep_readers.py (`alternate`);
    vgel/repeng@0ba7196 repeng/extract.py (`center`, `diff`).

    Differs: the default is `center`; a component's sign is arbitrary, and it is set by the mean
    projection of the differences for every pairing (repeng compares counts).
    """

    pairing: str = "center"

    def __post_init__(self) -> None:
        if self.pairing not in PAIRINGS:
            raise DataError(
                f"Option 'pairing' is {self.pairing!r}; expected one of {', '.join(PAIRINGS)}.",
                param="params.pairing",
            )

    def fit(
        self,
        preferred: torch.Tensor,
        dispreferred: torch.Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Return unit directions, `[n_layers, d]`, float32."""
        difference = preferred - dispreferred
        if self.pairing == "center":
            rows = torch.cat([difference / 2, -difference / 2])
        elif self.pairing == "diff":
            rows = difference
        else:
            signs = torch.ones(len(difference))
            signs[1::2] = -1
            rows = difference * signs[:, None, None]
        components = []
        for x in rows.unbind(1):
            fitted = SkPCA(n_components=1, random_state=0).fit(x.numpy())
            components.append(torch.from_numpy(fitted.components_[0]))
            if progress is not None:
                progress(len(components), rows.shape[1])
        directions = torch.stack(components).float()
        toward = torch.einsum("nld,ld->l", difference, directions)
        return torch.where(toward < 0, -1.0, 1.0).unsqueeze(1) * directions
