"""Equal inputs give equal bits: run by run, and whoever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from trimtab.kernels.formats import format_named
from trimtab.kernels.matmul import dispatch, operator
from trimtab.kernels.matmul.fragment_weight import FragmentWeight

pytestmark = pytest.mark.triton
N_OUT, N_IN = 100, 8 * 256


@pytest.fixture(params=["same", "fp8"])
def weight(request: pytest.FixtureRequest, device: torch.device) -> FragmentWeight:
    made = torch.randn(N_OUT, N_IN, generator=torch.Generator().manual_seed(0))
    activations: Any = request.param
    return FragmentWeight(
        format_named("nvfp4").quantize(made),
        device=device,
        dtype=torch.bfloat16,
        activations=activations,
    )


def draw(n_tokens: int, device: torch.device) -> torch.Tensor:
    made = torch.randn(n_tokens, N_IN, generator=torch.Generator().manual_seed(1))
    return made.to(torch.bfloat16).to(device)


def test_a_token_does_not_depend_on_its_batch(weight: FragmentWeight, device: torch.device) -> None:
    """A split, or a tile's order of sums, that follows the batch makes answers vary with load."""
    x = draw(33, device)
    together = weight(x)
    for which in (slice(0, 1), slice(3, 8), slice(10, 27)):
        assert torch.equal(weight(x[which]), together[which])
    assert torch.equal(weight(x), together)


def test_splits_add_up(weight: FragmentWeight, device: torch.device) -> None:
    """A split that leaves a block out, or counts one twice, is off by far more than rounding."""
    it, x = weight.fragments, draw(5, device)
    tile = dispatch.dispatch().table(it.scheme).tiles[0]
    whole, *parts = (
        operator.tile_product(
            x, it.codes, it.scales, it.rows, None, it.scheme, tile=tile, splits=splits
        ).float()
        for splits in (1, 2, 3, 8)
    )
    for split in parts:
        # Sums in another order: an ulp of bfloat16, 2^-8, where float32 rounds the other way.
        assert (split - whole).square().mean().sqrt() < 1e-3 * whole.square().mean().sqrt()


def test_nobody_is_there(weight: FragmentWeight, device: torch.device) -> None:
    """A grid of no programs is an error of the driver's."""
    assert weight(draw(0, device)).shape == (0, N_OUT)
    assert weight(draw(6, device).view(2, 3, N_IN)).shape == (2, 3, N_OUT)
