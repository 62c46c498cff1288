"""The methods that find a direction. One line a method; everything else derives from here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, Protocol

import torch

from trimtab.steering.errors import DataError, NotFoundError, did_you_mean, listed

METHODS = {
    "logistic": "trimtab.training.vectors.logistic:Logistic",
    "mass_mean": "trimtab.training.vectors.mass_mean:MassMean",
    "mean_difference": "trimtab.training.vectors.mean_difference:MeanDifference",
    "pca": "trimtab.training.vectors.pca:PCA",
}
ALIASES = {"caa": "mean_difference", "dim": "mean_difference", "repe": "pca", "repeng": "pca"}
DEFAULT = "mean_difference"


class Method(Protocol):
    """Finds one direction a layer from contrasted hidden states. A frozen dataclass of options."""

    def fit(self, preferred: torch.Tensor, dispreferred: torch.Tensor) -> torch.Tensor:
        """Return directions toward `preferred`, `[n_layers, d]`, float32, of any length.

        Args:
            preferred: hidden states, `[n, n_layers, d]`, float32.
            dispreferred: the same pairs' other side, the same shape.
        """
        ...


@dataclass(frozen=True)
class MethodCard:
    """A method for people: its name, summary line, source and options with their defaults."""

    name: str
    summary: str
    source: str
    options: dict[str, Any]


def method_class(name: str) -> type[Any]:
    """Return a method's class by name or alias.

    Raises:
        NotFoundError: unknown name.
    """
    target = METHODS.get(ALIASES.get(name, name))
    if target is None:
        known = [*METHODS, *ALIASES]
        raise NotFoundError(
            f"Unknown method {name!r}.{did_you_mean(name, known)} Known: {listed(METHODS)}."
        )
    module, attribute = target.split(":")
    found: type[Any] = getattr(import_module(module), attribute)
    return found


def make(name: str, options: dict[str, Any] | None = None) -> Method:
    """Return a method with options, text values converted to the option's type.

    Raises:
        NotFoundError: unknown method.
        DataError: unknown option or a value of the wrong kind.
    """
    kind = method_class(name)
    defaults: dict[str, Any] = {f.name: f.default for f in fields(kind)}
    given: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key not in defaults:
            raise DataError(
                f"Method {name!r} has no option {key!r}.{did_you_mean(key, defaults)} "
                f"Known: {listed(defaults)}."
            )
        wanted = type(defaults[key])
        try:
            given[key] = wanted(value) if not isinstance(value, wanted) else value
        except (TypeError, ValueError):
            raise DataError(
                f"Option {key!r} of {name!r} is {value!r}; expected {wanted.__name__}."
            ) from None
    made: Method = kind(**given)
    return made


def describe() -> list[MethodCard]:
    """Return a card for each method, by name."""
    cards = []
    for name in sorted(METHODS):
        kind = method_class(name)
        text = kind.__doc__ or ""
        source = text.partition("Source:")[2].partition("\n\n")[0]
        cards.append(
            MethodCard(
                name=name,
                summary=text.strip().splitlines()[0],
                source=" ".join(source.split()),
                options={f.name: f.default for f in fields(kind)},
            )
        )
    return cards
