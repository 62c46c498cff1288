"""Reading labelled texts and splitting them by group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toy_chat import toy_chat

from trimtab.steering.errors import DataError, NotFoundError
from trimtab.training.classifiers.examples import Example, ExampleSet, tokens_of
from trimtab.training.classifiers.readers import (
    bundled,
    bundled_names,
    read_instructions,
    read_log,
    read_texts,
)


def written(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def grouped(n_groups: int, labels: tuple[str, ...] = ("a", "b")) -> ExampleSet:
    """Every group has one example of each label."""
    return ExampleSet(
        "toy",
        tuple(
            Example("", f"text {g} {label}", (label,), f"g{g}")
            for g in range(n_groups)
            for label in labels
        ),
    )


def test_texts_are_read(tmp_path):
    """Catches a field that is dropped, or answers to one prompt in different groups."""
    file = written(
        tmp_path / "texts.jsonl",
        [
            {"text": "good", "label": "warm", "prompt": "How?", "split": "build"},
            {"text": "bad", "labels": ["cold", "short"], "prompt": "How?", "split": "build"},
            {"text": "alone\u2028here", "label": "cold", "split": "held"},
        ],
    )
    data = read_texts(file)
    first, second, third = data.examples
    assert first == Example((("user", "How?"),), "good", ("warm",), "How?", False)
    assert second.labels == ("cold", "short")
    assert first.group == second.group
    assert (third.prompt, third.answer, third.is_held) == ("", "alone\u2028here", True)
    assert data.labels == ("cold", "short", "warm")


def test_instructions_times_questions(tmp_path):
    """Catches a question whose styles land in different groups, or an instruction that is lost."""
    styles = tmp_path / "styles.json"
    styles.write_text(json.dumps({"terse": "BE BRIEF.", "kind": "BE KIND."}), encoding="utf-8")
    questions = written(
        tmp_path / "questions.jsonl", [{"id": "1", "text": "Why?"}, {"text": "How?"}]
    )
    data = read_instructions(styles, questions)
    assert [(e.prompt[0][1], e.labels[0], e.group) for e in data.examples] == [
        ("BE BRIEF.\nWhy?", "terse", "Why?"),
        ("BE KIND.\nWhy?", "kind", "Why?"),
        ("BE BRIEF.\nHow?", "terse", "How?"),
        ("BE KIND.\nHow?", "kind", "How?"),
    ]
    assert all(not e.answer for e in data.examples)


def test_log_rows_without_a_label_are_counted(tmp_path):
    """Catches rows that disappear unsaid, or a label from the wrong depth."""
    user = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    file = written(
        tmp_path / "log.jsonl",
        [
            {"messages": user, "text": "Hello", "metadata": {"rating": {"tone": "warm"}}},
            {"prompt": "Once", "text": " upon", "metadata": {"rating": {"tone": 3}}},
            {"messages": user, "text": "Yo", "metadata": {"rating": {}}},
            {"messages": user, "text": "Yo", "metadata": None},
            {"messages": user, "text": "", "metadata": {"rating": {"tone": "warm"}}},
            {"messages": user, "text": "y" * 20_000, "metadata": {"rating": {"tone": "warm"}}},
        ],
    )
    with file.open("a", encoding="utf-8") as opened:
        opened.write('\n{"messages": [{"role": "us')
    data = read_log(file, label_from="metadata.rating.tone")
    assert [e.labels for e in data.examples] == [("warm",), ("3",)]
    assert data.examples[0].prompt == (("system", "Be brief."), ("user", "Hi"))
    assert data.examples[1].prompt == "Once"
    assert data.skipped == {
        "no metadata.rating.tone": 2,
        "no answer": 1,
        "over 20000 characters": 1,
        "no whole line of JSON": 1,
    }
    with pytest.raises(DataError, match=r"no row with a metadata\.mood.*rating"):
        read_log(file, label_from="metadata.mood")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not an object"),
        ('{"label": "x"}', "no text under 'text'"),
        ('{"text": "  ", "label": "x"}', "no text under 'text'"),
        ('{"text": "t"}', "either a 'label' or a list"),
        ('{"text": "t", "label": "x", "labels": ["x"]}', "either a 'label' or a list"),
        ('{"text": "t", "label": 3}', "a label is a text"),
        ('{"text": "t", "labels": "x"}', "a label is a text"),
        ('{"text": "t", "label": "../x"}', "is not allowed"),
        ('{"text": "t", "labels": ["x", "x"]}', "given twice"),
        ('{"text": "t", "label": "x", "split": "test"}', "split is 'test'"),
        ('{"text": "t", "label": "x", "prompt": 3}', "no text under 'prompt'"),
        (json.dumps({"text": "t" * 20_001, "label": "x"}), "20001 characters"),
    ],
)
def test_a_bad_line_is_named(line, problem, tmp_path):
    """Catches an error that leaves the reader to search a file of thousands of lines."""
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "fine", "label": "x"}\n\n' + line, encoding="utf-8")
    with pytest.raises(DataError, match=r"texts\.jsonl:3") as caught:
        read_texts(file)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [], "text": "t"}, "not a list of messages"),
        ({"messages": [{"role": "user"}], "text": "t"}, "a message is"),
        ({"messages": [{"role": "god", "content": "x"}], "text": "t"}, "a message is"),
        ({"messages": ["x"], "text": "t"}, "a message is"),
        ({"text": "t"}, "no text under 'prompt'"),
        ({"prompt": "p", "text": 3}, "no text under 'text'"),
    ],
)
def test_a_bad_log_row_is_named(row, problem, tmp_path):
    """Catches a damaged log row that is trained on, or that ends in a traceback."""
    file = written(tmp_path / "log.jsonl", [{**row, "metadata": {"tone": "warm"}}])
    with pytest.raises(DataError, match=r"log\.jsonl:1") as caught:
        read_log(file, label_from="metadata.tone")
    assert problem in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    """Catches a traceback instead of the file's name."""
    for content in (None, b"\xff\xfe", b""):
        file = tmp_path / "texts.jsonl"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(DataError, match=r"texts\.jsonl"):
            read_texts(file)
    with pytest.raises(DataError, match="not a file"):
        read_texts(tmp_path)
    styles = tmp_path / "styles.json"
    questions = written(tmp_path / "q.jsonl", [{"text": "Why?"}])
    for text in ("{", "[]", "{}", '{"x": 3}'):
        styles.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"styles\.json"):
            read_instructions(styles, questions)
    for path in ("", "metadata.", ".tone"):
        with pytest.raises(DataError, match="no path to a label"):
            read_log(questions, label_from=path)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_keeps_groups_whole(seed):
    """Catches a question on two sides, which would make every measure too good."""
    data = grouped(20)
    split = data.split(seed=seed)
    sides = [{data.examples[i].group for i in side} for side in (split.fit, split.validation)]
    sides.append({data.examples[i].group for i in split.held})
    assert sum(map(len, sides)) == 20
    assert len(set().union(*sides)) == 20
    assert sorted(split.fit + split.validation + split.held) == list(range(40))
    assert [len(side) for side in sides] == [12, 4, 4]
    assert data.split(seed=seed) == split
    assert data.split(seed=seed + 1) != split


def test_what_held_rows_say_does_not_move_the_split():
    """Catches a stratified split through which held labels reach the fit."""
    data = grouped(20)
    split = data.split(seed=0)
    poisoned = tuple(
        Example(e.prompt, e.answer, ("a",), e.group) if i in split.held else e
        for i, e in enumerate(data.examples)
    )
    assert ExampleSet("toy", poisoned).split(seed=0) == split


def test_stated_split_is_kept():
    """Catches a row that its file holds back and that is trained on all the same."""
    examples = tuple(
        Example("", f"{i} {label}", (label,), f"{i}", is_held=i >= 8)
        for i in range(10)
        for label in ("a", "b")
    )
    split = ExampleSet("toy", examples).split(seed=0)
    assert split.held == (16, 17, 18, 19)


def test_splits_that_leak_are_refused():
    """Catches a group that its file puts on both sides."""
    rows = [Example("", f"{i}", ("a",), "same", is_held=i == 1) for i in range(2)]
    with pytest.raises(DataError, match="both held and built from"):
        ExampleSet("toy", tuple(rows))
    rows = [Example("", "x", ("a",), "x", is_held=True), Example("", "y", ("a",), "y")]
    with pytest.raises(DataError, match="some lines state"):
        ExampleSet("toy", tuple(rows))


def test_too_little_data_is_refused():
    """Catches a classifier without a row to stop on, or with a label it never saw."""
    with pytest.raises(DataError, match="nothing left"):
        grouped(2).split(seed=0)
    rare = tuple(
        Example("", f"{i}", ("b" if i == 9 else "a",), f"{i}", is_held=i >= 8) for i in range(10)
    )
    with pytest.raises(DataError, match="b occurs among the held rows"):
        ExampleSet("toy", rare).split(seed=0)
    with pytest.raises(DataError, match="has 1 labels"):
        grouped(9, ("a",)).check(is_exclusive=True)
    both = ExampleSet("toy", (*grouped(9).examples, Example("", "x", ("a", "b"), "x")))
    both.check(is_exclusive=False)
    with pytest.raises(DataError, match="--multi-label"):
        both.check(is_exclusive=True)


def test_tokens_are_what_the_model_reads_when_it_answers():
    """Catches a conversation that loses a message, or a prompt without its generation mark."""
    tokenizer = toy_chat().tokenizer

    def text(prompt: Any, answer: str) -> tuple[str, str]:
        tokens = tokens_of(tokenizer, Example(prompt, answer, (), "g"), max_context=512)
        ids = list(tokens.ids)
        return tokenizer.decode(ids[: tokens.n_prompt]), tokenizer.decode(ids[tokens.n_prompt :])

    chat = (("system", "S"), ("user", "Q"))
    mark = "<|start|>system\nS<|end|>\n<|start|>user\nQ<|end|>\n<|start|>assistant\n"
    assert text(chat, "yes") == (mark, "yes")
    assert text(chat, "") == (mark, "")
    assert text((*chat, ("assistant", "A")), "b") == (mark + "A", "b")
    assert text("Once", " upon") == ("Once", " upon")
    assert text("", "abc") == ("a", "bc")
    with pytest.raises(DataError, match="attends to 8"):
        tokens_of(tokenizer, Example("", "a" * 9, (), "g"), max_context=8)


def test_bundled_sets() -> None:
    """A set that is not in the wheel, or whose questions repeat across the split."""
    assert bundled_names() == ["tone"]
    data = bundled("tone")
    assert data.labels == ("casual", "cautious", "concise", "empathetic", "expert")
    assert len(data.examples) == 5 * len({e.group for e in data.examples})
    sides = data.split(seed=0)
    groups = [{data.examples[i].group for i in side} for side in (sides.fit, sides.held)]
    assert not groups[0] & groups[1]
    with pytest.raises(NotFoundError, match="tone"):
        bundled("tones")
