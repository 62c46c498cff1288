"""Contrastive pairs: the data a vector is built from, read, checked and split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from trimtab.steering.errors import DataError, NotFoundError, did_you_mean, listed

MAX_PAIRS = 20_000
MAX_CHARACTERS = 20_000
_MIN_PAIRS = 4


@dataclass(frozen=True)
class Pair:
    """A prompt with an answer that shows the concept and one that does not.

    `prompt` is empty for two texts without a prompt. `is_held` keeps a pair out of building, for
    measuring afterwards.
    """

    prompt: str
    preferred: str
    dispreferred: str
    is_held: bool = False


@dataclass(frozen=True)
class PairSet:
    """Pairs of one concept.

    Attributes:
        name: what to call the data in an artifact.
        pairs: all of them.
        n_dropped: pairs left out because their two sides came out equal or empty.
    """

    name: str
    pairs: tuple[Pair, ...]
    n_dropped: int = 0

    def __post_init__(self) -> None:
        if len(self.build) < _MIN_PAIRS:
            raise DataError(
                f"{self.name} has {len(self.build)} pairs to build from; at least {_MIN_PAIRS} "
                "are needed, and 40 or more make a useful vector."
            )

    @property
    def build(self) -> list[Pair]:
        """Pairs to fit and calibrate on."""
        return [pair for pair in self.pairs if not pair.is_held]

    @property
    def held(self) -> list[Pair]:
        """Pairs to measure on; building never sees them."""
        return [pair for pair in self.pairs if pair.is_held]

    def fit_and_calibration(self) -> tuple[list[Pair], list[Pair]]:
        """Return the build pairs as those to fit the direction on and those to calibrate on.

        Every fourth prompt is for calibration, with all its pairs.
        """
        fit: list[Pair] = []
        calibration: list[Pair] = []
        sides: dict[str, list[Pair]] = {}
        turn = 0  # prompts, not pairs: with four pairs a prompt no turn would be calibration's
        for pair in self.build:
            side = sides.get(pair.prompt) if pair.prompt else None
            if side is None:
                side = calibration if turn % 4 == 3 else fit
                sides[pair.prompt] = side
                turn += 1
            side.append(pair)
        return fit, calibration

    @property
    def sha256(self) -> str:
        """Hash of the pairs' texts and split."""
        rows = [[p.prompt, p.preferred, p.dispreferred, p.is_held] for p in self.pairs]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def concepts() -> list[str]:
    """Return the names of the bundled concepts."""
    folder = resources.files("trimtab.training.vectors") / "concepts"
    return sorted(
        entry.name.removesuffix(".jsonl")
        for entry in folder.iterdir()
        if entry.name.endswith(".jsonl")
    )


def concept(name: str) -> PairSet:
    """Return a bundled concept's pairs.

    Raises:
        NotFoundError: no such concept.
    """
    known = concepts()
    if name not in known:
        raise NotFoundError(
            f"Unknown concept {name!r}.{did_you_mean(name, known)} Bundled: {listed(known)}."
        )
    folder = resources.files("trimtab.training.vectors") / "concepts"
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return pair_set(_parsed(lines, name=name), name=name)


def read_pairs(path: Path, *, name: str | None = None) -> PairSet:
    """Read pairs from a JSONL file.

    Each line is `{"prompt", "preferred", "dispreferred"}` or, for texts without a prompt,
    `{"positive", "negative"}`; an optional `split` is "build" or "held". Without any `split`, a
    third of the prompts is held, chosen by hash, so that a prompt is never on both sides.

    Raises:
        DataError: the file cannot be read, a line is at fault (named), or there is too little.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    name = name or path.name
    return pair_set(_parsed(lines, name=name), name=name)


def pair_set(given: Iterable[tuple[str, Any]], *, name: str) -> PairSet:
    """Return pairs from rows that are parsed already; see `read_pairs` for what a row is.

    Args:
        given: where each row stands, for messages, and the row.
        name: what to call the data in an artifact.

    Raises:
        DataError: a row is at fault, its place and field in `param`, or there is too little.
    """
    rows = []
    for where, row in given:
        rows.append(_row(row, where=where))
        if len(rows) > MAX_PAIRS:
            raise DataError(f"{name} has more than {MAX_PAIRS} pairs.")
    stated = {row["split"] for row in rows}
    if None in stated and len(stated) > 1:
        raise DataError(f"{name}: some lines state a `split` and some do not.")
    pairs = [
        Pair(
            row["prompt"],
            row["preferred"],
            row["dispreferred"],
            row["split"] == "held" if row["split"] else _is_held(row),
        )
        for row in rows
    ]
    return PairSet(name, tuple(pairs))


def _is_held(row: dict[str, Any]) -> bool:
    key = row["prompt"] or row["preferred"]
    return hashlib.sha256(key.encode()).digest()[0] % 3 == 0


def _parsed(lines: Iterable[str], *, name: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{name}:{number}"
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise DataError(f"{where} is not valid JSON: {error}.") from None


def _row(row: Any, *, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object.", param=where)
    keys = ("prompt", "preferred", "dispreferred")
    if "positive" in row or "negative" in row:
        row = {**row, "prompt": ""}
        keys = ("prompt", "positive", "negative")
    texts = []
    for key in keys:
        value, param = row.get(key), f"{where}.{key}"
        if not isinstance(value, str) or (key != "prompt" and not value.strip()):
            raise DataError(
                f"{where} has no text under {key!r}; a row is "
                '{"prompt", "preferred", "dispreferred"} or {"positive", "negative"}.',
                param=param,
            )
        if len(value) > MAX_CHARACTERS:
            raise DataError(
                f"{where}: {key!r} has {len(value)} characters, over {MAX_CHARACTERS}.", param=param
            )
        texts.append(value)
    prompt, preferred, dispreferred = texts
    if preferred == dispreferred:
        raise DataError(f"{where} has the same text on both sides.", param=f"{where}.{keys[2]}")
    split = row.get("split")
    if split not in (None, "build", "held"):
        raise DataError(
            f"{where}: split is {str(split)[:80]!r}; expected 'build' or 'held'.",
            param=f"{where}.split",
        )
    return {
        "prompt": prompt,
        "preferred": preferred,
        "dispreferred": dispreferred,
        "split": split,
    }
