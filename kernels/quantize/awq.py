"""AWQ: make the columns that matter larger before rounding, and their inputs smaller by as much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trimtab.kernels.formats import Format

N_EXPONENTS = 20
_SMALLEST = 1e-4
# Clipping: from the largest weight down to half of it, measured on at most so many tokens.
_CLIP_STEPS, _CLIP_SHARE = 10, 0.5
_CLIP_TOKENS = 512
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class AwqChoice:
    """What the search found.

    Attributes:
        exponent: 0 leaves everything as it is.
        scale: columns are multiplied by it and their inputs divided, `[n_in]`, float32.
        loss: of the scale chosen.
        loss_before: of exponent 0.
    """

    exponent: float
    scale: torch.Tensor
    loss: float
    loss_before: float


def awq_scale(magnitude: torch.Tensor, exponent: float) -> torch.Tensor:
    """Return the scale of each column for an exponent, `[n_in]`, float32.

    Args:
        magnitude: mean |x| of each input over the tokens, `[n_in]`.
        exponent: 0 to 1.

    Source: mit-han-lab/llm-awq auto_scale.py (`_search_module_scale`); arXiv 2306.00978, equation
    5.
    """
    scale = magnitude.float().pow(exponent).clamp_min(_SMALLEST)
    scale = scale / (scale.max() * scale.min()).sqrt()
    # An input that is never anything has no scale: magnitude 0 or what it divides to.
    return torch.where(torch.isfinite(scale) & (scale > 0), scale, torch.ones_like(scale))


def search_scale(
    weights: Sequence[torch.Tensor],
    magnitude: torch.Tensor,
    *,
    quantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    loss: Callable[[Sequence[torch.Tensor]], float],
) -> AwqChoice:
    """Try the exponents 0, 1/20, ... 19/20 and keep the one that hurts the output least.

    Args:
        weights: the matrices that read the same inputs, each `[n_out, n_in]`.
        magnitude: mean |x| of each input, `[n_in]`.
        quantize: given a scaled matrix and the scale, what rounding makes of it (still scaled).
        loss: how far the output is off with these matrices in place of `weights`.

    Returns:
        The best choice; of equal ones the smallest exponent.

    Source: mit-han-lab/llm-awq auto_scale.py; arXiv 2306.00978, section 3.2.
    """
    best: AwqChoice | None = None
    before = 0.0
    for step in range(N_EXPONENTS):
        exponent = step / N_EXPONENTS
        scale = awq_scale(magnitude, exponent)
        rounded = [quantize(weight.float() * scale, scale) / scale for weight in weights]
        found = loss(rounded)
        before = before if step else found
        if best is None or found < best.loss:
            best = AwqChoice(exponent, scale, found, before)
    assert best is not None  # the range is not empty
    return AwqChoice(best.exponent, best.scale, best.loss, before)


def clip(weight: torch.Tensor, inputs: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Clip each row's groups where that brings the group's share of the output closer.

    A smaller largest weight makes finer steps for all others.

    Args:
        weight: `[n_out, n_in]`, any float.
        inputs: calibration inputs, `[n_tokens, n_in]`; at most 512 of them are used, evenly spread.
        fmt: the format.

    Returns:
        The weight, clipped, `[n_out, n_in]`, float32.

    Source: mit-han-lab/llm-awq auto_clip.py (`auto_clip_layer`).
    """
    n_out, n_in = weight.shape
    size = fmt.group_size
    stride = max(1, len(inputs) // _CLIP_TOKENS)
    tokens = inputs[::stride][:_CLIP_TOKENS].float().view(-1, n_in // size, size)
    # [n_groups, size, size]: the error of a group is e^T M e, whatever the tokens' number.
    moments = torch.einsum("tgi,tgj->gij", tokens, tokens)
    wide = weight.float()
    largest = wide.view(n_out, -1, size).abs().amax(-1, keepdim=True)
    best, least = wide.clone(), torch.full((n_out, n_in // size), torch.inf, device=weight.device)
    for step in range(int(_CLIP_STEPS)):
        bound = largest * (1 - step * _CLIP_SHARE / _CLIP_STEPS)
        clipped = wide.view(n_out, -1, size).clamp(-bound, bound).view(n_out, n_in)
        grid = fmt.fit(clipped, search="amax")
        every = slice(0, n_in)
        off = (grid.decode(grid.encode(clipped, columns=every), columns=every) - wide).view(
            n_out, -1, size
        )
        for at in range(0, n_out, _ROWS_AT_ONCE):
            rows = slice(at, at + _ROWS_AT_ONCE)
            lost = torch.einsum("ogi,gij,ogj->og", off[rows], moments, off[rows])
            is_better = lost < least[rows]
            least[rows] = torch.where(is_better, lost, least[rows])
            best[rows] = torch.where(
                is_better.repeat_interleave(size, 1), clipped[rows], best[rows]
            )
    return best
