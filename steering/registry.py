"""Methods by name: found lazily, made from options, described for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any

from trimtab.steering.errors import DataError, NotFoundError, did_you_mean, listed


@dataclass(frozen=True)
class MethodCard:
    """A method for people: its name, summary line, source and options with their defaults."""

    name: str
    summary: str
    source: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Registry:
    """Names of methods, each a frozen dataclass of options.

    Attributes:
        methods: name -> `module:Class`, imported when first asked for.
        aliases: other names -> name.
    """

    methods: Mapping[str, str]
    aliases: Mapping[str, str]

    def name_of(self, name: str) -> str:
        """Return a method's own name for a name or an alias."""
        return self.aliases.get(name, name)

    def find(self, name: str) -> type[Any]:
        """Return a method's class by name or alias.

        Raises:
            NotFoundError: unknown name.
        """
        target = self.methods.get(self.name_of(name))
        if target is None:
            known = [*self.methods, *self.aliases]
            raise NotFoundError(
                f"Unknown method {name!r}.{did_you_mean(name, known)} "
                f"Known: {listed(self.methods)}.",
                param="method",
            )
        module, attribute = target.split(":")
        found: type[Any] = getattr(import_module(module), attribute)
        return found

    def make(self, name: str, options: Mapping[str, Any] | None = None) -> Any:
        """Return a method with options, text values converted to the option's type.

        Raises:
            NotFoundError: unknown method.
            DataError: unknown option or a value of the wrong kind.
        """
        kind = self.find(name)
        defaults: dict[str, Any] = {f.name: f.default for f in fields(kind)}
        given: dict[str, Any] = {}
        for key, value in (options or {}).items():
            if key not in defaults:
                raise DataError(
                    f"Method {name!r} has no option {key!r}.{did_you_mean(key, defaults)} "
                    f"Known: {listed(defaults)}.",
                    param=f"params.{key}",
                )
            given[key] = _converted(name, key, value, wanted=type(defaults[key]))
        return kind(**given)

    def describe(self) -> list[MethodCard]:
        """Return a card for each method, by name."""
        cards = []
        for name in sorted(self.methods):
            kind = self.find(name)
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


def _converted(method: str, key: str, value: Any, *, wanted: type[Any]) -> Any:
    if isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
        return value
    if wanted is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        if wanted is bool or isinstance(value, bool):
            raise ValueError
        if wanted is int and isinstance(value, float) and not value.is_integer():
            raise ValueError
        return wanted(value)
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"Option {key!r} of {method!r} is {value!r}; expected {wanted.__name__}.",
            param=f"params.{key}",
        ) from None
