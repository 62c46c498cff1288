"""Files that examples are read from: labelled texts, instructions with questions, a log."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from trimtab.steering.errors import DataError, NotFoundError, did_you_mean, listed
from trimtab.training.classifiers.examples import MAX_EXAMPLES, Chat, Example, ExampleSet

MAX_CHARACTERS = 20_000
_MAX_LOGGED = MAX_CHARACTERS  # of a conversation with its answer, as JSON
MAX_LINES = 1_000_000
MAX_FILE_BYTES = 512 * 2**20
_BUNDLED = resources.files("trimtab.training.classifiers") / "bundled"
_ROLES = ("system", "developer", "user", "assistant", "tool")


def read_texts(path: Path) -> ExampleSet:
    """Read labelled texts from JSON lines.

    A line is `{"text", "label"}` or `{"text", "labels": [...]}`, with an optional `prompt` the
    text answers and an optional `split`, "build" or "held". Answers to one prompt are a group.

    Raises:
        DataError: the file cannot be read, or a line is at fault (named).
    """
    return labelled_texts(_rows(path), name=path.name)


def labelled_texts(rows: Iterable[tuple[str, Any]], *, name: str) -> ExampleSet:
    """Return labelled texts from rows that are parsed already; see `read_texts` for what a row is.

    Args:
        rows: where each row stands, for messages, and the row.
        name: what to call the data in an artifact.

    Raises:
        DataError: a row is at fault, its place and field in `param`.
    """
    return _set(name, [_labelled_text(row, where=where) for where, row in rows])


def _labelled_text(row: Any, *, where: str) -> Example:
    if not isinstance(row, dict):
        raise DataError(f"{where} is not an object.", param=where)
    text, prompt = _text(row, "text", where=where), _text(row, "prompt", where=where, least=0)
    split = row.get("split")
    if split not in (None, "build", "held"):
        raise DataError(
            f"{where}: split is {str(split)[:80]!r}; expected 'build' or 'held'.",
            param=f"{where}.split",
        )
    labels = _labels(row, where=where)
    try:
        return Example(
            prompt=(("user", prompt),) if prompt else "",
            answer=text,
            labels=labels,
            group=prompt or text,
            is_held=None if split is None else split == "held",
            where=where,
        )
    except DataError as error:
        error.param = f"{where}.labels" if "labels" in row else f"{where}.label"
        raise


def read_instructions(instructions: Path, questions: Path) -> ExampleSet:
    """Read every instruction with every question: a prompt each, labelled by the instruction.

    Args:
        instructions: JSON `{label: instruction}`.
        questions: JSON lines with a `text`; a question is a group.

    Raises:
        DataError: a file cannot be read, or is at fault at a named place.
    """
    try:
        styles = json.loads(_read(instructions))
    except ValueError as error:
        raise DataError(f"{instructions.name} is not valid JSON: {error}.") from None
    if not isinstance(styles, dict) or not styles:
        raise DataError(f'{instructions.name} must be an object {{"label": "instruction"}}.')
    wanted = {label: _text(styles, label, where=instructions.name) for label in styles}
    examples = []
    for where, row in _rows(questions):
        question = _text(row, "text", where=where)
        examples += [
            Example(
                prompt=(("user", f"{instruction}\n{question}"),),
                answer="",
                labels=(label,),
                group=question,
                where=where,
            )
            for label, instruction in wanted.items()
        ]
        if len(examples) > MAX_EXAMPLES:
            raise DataError(
                f"{questions.name} and {instructions.name} make more than {MAX_EXAMPLES} examples; "
                "give fewer questions."
            )
    return _set(f"{instructions.name} x {questions.name}", examples)


def bundled(name: str) -> ExampleSet:
    """Return a bundled set of instructions, each with every bundled question.

    Raises:
        NotFoundError: there is none of that name.
    """
    known = bundled_names()
    if name not in known:
        raise NotFoundError(
            f"There is no bundled set {name!r}.{did_you_mean(name, known)} Known: {listed(known)}."
        )
    with resources.as_file(_BUNDLED / f"{name}.json") as instructions:
        return read_instructions(instructions, instructions.parent / "questions.jsonl")


def bundled_names() -> list[str]:
    """Return the names of the bundled sets, sorted."""
    names = (file.name for file in _BUNDLED.iterdir())
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json"))


def read_log(path: Path, *, label_from: str) -> ExampleSet:
    """Read a server's generation log, labelled by a field of it.

    A line has `messages` or `prompt`, `text` (the answer) and whatever `label_from` names. Rows
    without a label or an answer, very long ones, and lines that a crash has torn are counted in
    `skipped`. A conversation is a group.

    Args:
        path: JSON lines.
        label_from: dotted path to the label, such as `metadata.tone`: a text, a number, a truth
            value or a list of texts.

    Raises:
        DataError: the file cannot be read, a line is at fault (named), or no row has a label.
    """
    keys = label_from.split(".")
    if not all(keys):
        raise DataError(f"{label_from!r} is no path to a label; expected one like metadata.tone.")
    examples: list[Example] = []
    skipped: dict[str, int] = {}
    seen: set[str] = set()
    for where, row in _rows(path, skipped=skipped):
        found = _at(row, keys)
        if found is None or found == "":
            metadata = row.get("metadata")
            seen |= set(metadata) if isinstance(metadata, dict) else set()
            _count(skipped, f"no {label_from}")
        elif not row.get("text"):
            _count(skipped, "no answer")
        elif _length(row) > _MAX_LOGGED:
            _count(skipped, f"over {_MAX_LOGGED} characters")
        else:
            prompt = _prompt(row, where=where)
            examples.append(
                Example(
                    prompt=prompt,
                    answer=_text(row, "text", where=where),
                    labels=_logged_labels(found, label_from, where=where),
                    group=prompt if isinstance(prompt, str) else json.dumps(prompt),
                    where=where,
                )
            )
    if not examples and skipped:
        there = f" Its rows' metadata has: {', '.join(sorted(seen)[:12])}." if seen else ""
        raise DataError(f"{path.name} has no row with a {label_from} and an answer.{there}")
    return _set(path.name, examples, skipped)


def _set(name: str, examples: list[Example], skipped: dict[str, int] | None = None) -> ExampleSet:
    if not examples:
        raise DataError(f"{name} has no examples.")
    return ExampleSet(name, tuple(examples), skipped or {})


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise DataError(f"{path} is not a file.")
        if size > MAX_FILE_BYTES:
            raise DataError(f"{path} has {size} bytes; at most {MAX_FILE_BYTES} are read.")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None


def _length(row: dict[str, Any]) -> int:
    texts = [row.get("messages"), row.get("prompt"), row["text"]]
    return len(json.dumps(texts, ensure_ascii=False))


def _count(skipped: dict[str, int], reason: str) -> None:
    skipped[reason] = skipped.get(reason, 0) + 1


def _rows(
    path: Path, *, skipped: dict[str, int] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file:line, object) of every line that is not empty.

    A line that is not JSON is an error, or counted where it is told how.
    """
    # By newlines alone: JSON may hold the other line ends that splitlines() knows.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        if number > MAX_LINES:
            raise DataError(f"{path.name} has more than {MAX_LINES} lines.")
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if skipped is not None:
                _count(skipped, "no whole line of JSON")
                continue
            raise DataError(f"{where} is not valid JSON: {error}.") from None
        if not isinstance(row, dict):
            raise DataError(f"{where} is not an object.")
        yield where, row


def _text(row: dict[str, Any], key: str, *, where: str, least: int = 1) -> str:
    value = row.get(key, "" if least == 0 else None)
    if not isinstance(value, str) or (least and not value.strip()):
        raise DataError(f"{where} has no text under {key!r}.", param=f"{where}.{key}")
    if len(value) > MAX_CHARACTERS:
        raise DataError(
            f"{where}: {key!r} has {len(value)} characters, over {MAX_CHARACTERS}.",
            param=f"{where}.{key}",
        )
    return value


def _labels(row: dict[str, Any], *, where: str) -> tuple[str, ...]:
    if ("label" in row) == ("labels" in row):
        raise DataError(
            f"{where} needs either a 'label' or a list of 'labels'.", param=f"{where}.label"
        )
    given = row["labels"] if "labels" in row else [row["label"]]
    if not isinstance(given, list) or not all(isinstance(label, str) for label in given):
        param = f"{where}.labels" if "labels" in row else f"{where}.label"
        raise DataError(f"{where}: a label is a text, `labels` a list of them.", param=param)
    return tuple(given)


def _logged_labels(value: Any, label_from: str, *, where: str) -> tuple[str, ...]:
    given = value if isinstance(value, list) else [value]
    if not all(isinstance(label, str | int | float) for label in given):
        raise DataError(f"{where}: {label_from} is {str(value)[:60]!r}, not a label or a list.")
    return tuple(str(x).lower() if isinstance(x, bool) else str(x) for x in given)


def _at(row: Any, keys: list[str]) -> Any:
    for key in keys:
        row = row.get(key) if isinstance(row, dict) else None
    return row


def _prompt(row: dict[str, Any], *, where: str) -> str | Chat:
    if row.get("messages") is None:
        return _text(row, "prompt", where=where)
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages is not a list of messages.")
    chat = []
    for message in messages:
        role, content = (
            (message.get("role"), message.get("content"))
            if isinstance(message, dict)
            else (None, None)
        )
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(f'{where}: a message is {{"role", "content"}} with texts.')
        chat.append(("system" if role == "developer" else role, content))
    return tuple(chat)
