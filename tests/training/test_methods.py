"""Laws of the methods that find a direction, on data with a planted one."""

from __future__ import annotations

import pytest
import torch

from trimtab.steering.errors import DataError, NotFoundError
from trimtab.training.vectors.probes import fit_probes
from trimtab.training.vectors.registry import (
    ALIASES,
    METHODS,
    ModelMethod,
    describe,
    make,
    method_class,
)

N, LAYERS, WIDTH = 80, 3, 16
# The others ask the model itself; they have tests of their own.
FROM_STATES = [n for n in sorted(METHODS) if not issubclass(method_class(n), ModelMethod)]


def planted(
    *, noise: float = 0.3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states whose sides differ along one unit direction a layer."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(LAYERS, WIDTH, generator=generator)
    directions = directions / directions.norm(dim=1, keepdim=True)
    topic = torch.randn(N, LAYERS, WIDTH, generator=generator)
    own = torch.randn(2, N, LAYERS, WIDTH, generator=generator) * noise
    size = 1.0 + torch.rand(N, 1, 1, generator=generator)
    return topic + own[0] + size * directions, topic + own[1] - size * directions, directions


def cosines(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(found, wanted, dim=1)


@pytest.mark.parametrize("name", FROM_STATES)
def test_a_planted_direction_is_found_with_its_sign(name):
    """Catches a wrong axis, a layer mixed with another, and an arbitrary sign."""
    preferred, dispreferred, directions = planted()
    found = make(name).fit(preferred, dispreferred)
    assert found.dtype == torch.float32
    assert cosines(found, directions).min() > 0.9


@pytest.mark.parametrize("name", FROM_STATES)
def test_swapping_the_sides_turns_the_direction(name):
    """Catches a sign taken from the order of the data."""
    preferred, dispreferred, _ = planted()
    there = make(name).fit(preferred, dispreferred)
    back = make(name).fit(dispreferred, preferred)
    assert cosines(there, back).max() < -0.99


@pytest.mark.parametrize("pairing", ["center", "diff", "alternate"])
def test_every_pairing_of_pca_points_to_the_preferred_side(pairing):
    """Catches a component whose sign was left as the solver gave it."""
    for seed in range(5):
        preferred, dispreferred, _ = planted(seed=seed)
        found = make("pca", {"pairing": pairing}).fit(preferred, dispreferred)
        gap = torch.einsum("nld,ld->l", preferred - dispreferred, found)
        assert gap.min() > 0
        assert torch.allclose(found.norm(dim=1), torch.ones(LAYERS), atol=1e-5)


def test_mean_difference_is_exactly_that():
    """Catches a normalisation or centring slipped in."""
    preferred, dispreferred, _ = planted()
    found = make("caa").fit(preferred, dispreferred)
    assert torch.allclose(found, preferred.mean(0) - dispreferred.mean(0), atol=1e-6)


def test_mass_mean_turns_away_from_noisy_dimensions():
    """Catches a mass-mean that is the plain difference under another name."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(2, 400, 1, 2, generator=generator) * torch.tensor([5.0, 0.5])
    preferred, dispreferred = (
        noise[0] + torch.tensor([1.0, 1.0]),
        noise[1] - torch.tensor([1.0, 1.0]),
    )
    plain = make("mean_difference").fit(preferred, dispreferred)[0]
    tilted = make("mass_mean").fit(preferred, dispreferred)[0]
    assert tilted[1] / tilted[0] > 10 * plain[1] / plain[0]


def test_every_method_says_where_it_comes_from():
    """Catches a method without its source, or one that the menus would show without a summary."""
    cards = describe()
    assert [card.name for card in cards] == sorted(METHODS)
    for card in cards:
        assert "arXiv" in card.source or "@" in card.source
        assert card.summary.endswith(".")
    assert set(ALIASES.values()) <= set(METHODS)


def test_unknown_names_and_options_are_refused():
    """Catches an option that is silently ignored."""
    with pytest.raises(NotFoundError, match="Did you mean 'pca'"):
        make("pcaa")
    with pytest.raises(DataError, match="Did you mean 'pairing'"):
        make("pca", {"paring": "diff"})
    with pytest.raises(DataError, match="expected one of"):
        make("pca", {"pairing": "sideways"})
    with pytest.raises(DataError, match="expected float"):
        make("logistic", {"c": "much"})
    assert make("logistic", {"c": "0.5"}).c == 0.5  # type: ignore[attr-defined]


def test_probes_are_calibrated_and_choose_the_layer_that_separates():
    """Catches slope and intercept swapped, or a best layer taken from the fitting data."""
    preferred, dispreferred, directions = planted()
    states = torch.stack([preferred, dispreferred], dim=1)
    states[:, :, 0] = torch.randn(N, 2, WIDTH, generator=torch.Generator().manual_seed(1))
    fitted = fit_probes(directions, states[:60], states[60:])
    assert fitted.best in (1, 2)
    assert fitted.accuracy[fitted.best] > 0.9
    slope, intercept = fitted.table[fitted.best]
    projection = states[60:, :, fitted.best] @ directions[fitted.best]
    probability = torch.sigmoid(slope * projection + intercept)
    right = torch.stack([probability[:, 0] > 0.5, probability[:, 1] < 0.5]).float().mean()
    assert float(right) == pytest.approx(fitted.accuracy[fitted.best], abs=1e-6)
