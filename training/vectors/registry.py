"""The methods that find a direction. One line a method; everything else derives from here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from trimtab.steering.registry import MethodCard, Registry
from trimtab.training.steered_model import SteeredModel
from trimtab.training.vectors.pairs import Pair

METHODS = {
    "grains": "trimtab.training.vectors.grains:Grains",
    "logistic": "trimtab.training.vectors.logistic:Logistic",
    "mass_mean": "trimtab.training.vectors.mass_mean:MassMean",
    "mean_difference": "trimtab.training.vectors.mean_difference:MeanDifference",
    "pca": "trimtab.training.vectors.pca:PCA",
}
ALIASES = {"caa": "mean_difference", "dim": "mean_difference", "repe": "pca", "repeng": "pca"}
DEFAULT = "mean_difference"
_REGISTRY = Registry(METHODS, ALIASES)


@runtime_checkable
class StateMethod(Protocol):
    """Finds one direction a layer from contrasted hidden states. A frozen dataclass of options."""

    def fit(
        self,
        preferred: torch.Tensor,
        dispreferred: torch.Tensor,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Return directions toward `preferred`, `[n_layers, d]`, float32, of any length.

        Args:
            preferred: hidden states, `[n, n_layers, d]`, float32.
            dispreferred: the same pairs' other side, the same shape.
            progress: called with layers done and in all, by methods that take their time; what it
                raises ends the fit.
        """
        ...


@runtime_checkable
class ModelMethod(Protocol):
    """Finds one direction a layer by asking the model. A frozen dataclass of options."""

    def check(self, pairs: Sequence[Pair]) -> None:
        """Refuse, before the model is asked, pairs the method can learn nothing from.

        Raises:
            DataError: saying which and why.
        """
        ...

    def find(
        self,
        host: SteeredModel,
        pairs: Sequence[Pair],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> torch.Tensor:
        """Return directions toward the preferred answers, `[n_layers, d]`, float32.

        Args:
            host: the model, unsteered.
            pairs: what to learn from.
            progress: called with pairs done and pairs in all.

        Raises:
            DataError: pairs the method can learn nothing from.
        """
        ...


Method = StateMethod | ModelMethod


def method_class(name: str) -> type[Any]:
    """Return a method's class by name or alias.

    Raises:
        NotFoundError: unknown name.
    """
    return _REGISTRY.find(name)


def make(name: str, options: dict[str, Any] | None = None) -> Method:
    """Return a method with options, text values converted to the option's type.

    Raises:
        NotFoundError: unknown method.
        DataError: unknown option or a value of the wrong kind.
    """
    made: Method = _REGISTRY.make(name, options)
    return made


def describe() -> list[MethodCard]:
    """Return a card for each method, by name."""
    return _REGISTRY.describe()
