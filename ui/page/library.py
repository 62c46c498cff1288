"""What is stored on the server: vectors, classifiers and presets, as the Library shows them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from trimtab.steering.errors import TrimtabError
from trimtab.steering.spec import ID_PATTERN, TERM_KINDS
from trimtab.ui.page.api import Api

# By the word for one of them: what all of them are called, which is also the API's path.
KINDS = {"vector": "vectors", "classifier": "classifiers", "preset": "presets"}
_ID = re.compile(ID_PATTERN)


class StoredNameError(TrimtabError):
    """A name that nothing can be stored under."""

    code = "invalid_name"


def checked_name(name: str) -> str:
    """Return a name that something can be stored under.

    Raises:
        StoredNameError: it is none.
    """
    if not _ID.fullmatch(name):
        raise StoredNameError(
            f"{name[:80]!r} cannot be a name: use letters, digits, '.', '_' and '-', "
            "starting with a letter or digit, at most 64 characters."
        )
    return name


@dataclass(frozen=True)
class Item:
    """One stored thing: which kind, and its id. Ids are unique within a kind."""

    kind: str
    id: str

    def __str__(self) -> str:
        return f"the {self.kind} {self.id}"

    @property
    def path(self) -> str:
        """Its place in the server's API.

        Raises:
            StoredNameError: its id could be mistaken for a path.
        """
        return f"/v1/steering/{KINDS[self.kind]}/{checked_name(self.id)}"


@dataclass(frozen=True)
class Library:
    """All that is stored.

    Attributes:
        cards: by kind, each by id: what the API tells of it.
        problems: by kind: files that cannot be read, and why.
    """

    cards: dict[str, dict[str, dict[str, Any]]]
    problems: dict[str, dict[str, str]]

    def __contains__(self, item: Item) -> bool:
        return item.id in self.cards[item.kind]

    def presets_naming(self, item: Item) -> list[str]:
        """Return the presets that would fail without a vector or classifier, by name."""
        presets = self.cards["preset"].values()
        return sorted(card["id"] for card in presets if item in named(card["spec"]))


@dataclass
class Browsing:
    """What one visitor sees of the library.

    Attributes:
        library: what was stored when it was last asked for.
        chosen: what is shown in full.
        press: the number of the press that chose it.
        to_delete: what the visitor was asked about.
        deleted: what has gone, until the chat's panel is told.
        showing: held while the tab is filled.
    """

    library: Library | None = None
    chosen: Item | None = None
    press: int = 0
    to_delete: Item | None = None
    deleted: Item | None = None
    showing: asyncio.Lock = field(default_factory=asyncio.Lock)


async def stored(api: Api) -> Library:
    """Ask the server for all that it stores.

    Raises:
        ServerError: it cannot be asked.
    """
    answers = await asyncio.gather(*(api.get(f"/v1/steering/{each}") for each in KINDS.values()))
    found = dict(zip(KINDS, answers, strict=True))
    return Library(
        {kind: {card["id"]: card for card in answer["data"]} for kind, answer in found.items()},
        {kind: answer.get("problems") or {} for kind, answer in found.items()},
    )


def named(spec: dict[str, Any]) -> list[Item]:
    """Return what a preset's spec names, in its order, each once.

    A gate names too: `tone/casual` is a classifier's label, `warm` a vector's own probe.
    """
    return list(dict.fromkeys(_named(spec)))


def _named(spec: dict[str, Any]) -> Iterator[Item]:
    terms = [term for kind in TERM_KINDS for term in spec.get(kind, ())]
    for term in terms:
        if "classifier" in term:
            yield Item("classifier", term["classifier"])
        else:
            yield Item("vector", term["id"])
    for holder in (spec, *terms):
        gate = holder.get("when")
        if gate:
            name, _, label = gate["probe"].partition("/")
            yield Item("classifier" if label else "vector", name)
