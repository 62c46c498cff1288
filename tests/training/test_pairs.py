"""The data: bundled concepts, files of pairs, and splits that never share a prompt."""

from __future__ import annotations

import json

import pytest

from trimtab.steering.errors import DataError, NotFoundError
from trimtab.training.vectors.neutral import neutral_questions, neutral_text
from trimtab.training.vectors.pairs import concept, concepts, read_pairs


@pytest.mark.parametrize("name", concepts())
def test_a_bundled_concept_has_sixty_pairs_and_a_held_third(name):
    """Catches a truncated file, a missing split or a prompt on both sides."""
    pairs = concept(name)
    assert len(pairs.pairs) >= 60
    assert len(pairs.held) * 3 >= len(pairs.pairs)
    prompts = [pair.prompt for pair in pairs.pairs]
    assert len(set(prompts)) == len(prompts)
    fit, calibration = pairs.fit_and_calibration()
    assert len(fit) + len(calibration) + len(pairs.held) == len(prompts)
    assert len(calibration) * 4 >= len(pairs.build) - 3


def test_there_are_six_concepts_and_none_shares_a_prompt():
    """Catches a concept lost from the package data, and one question in two concepts."""
    names = concepts()
    assert len(names) >= 6
    prompts = [pair.prompt for name in names for pair in concept(name).pairs]
    assert len(set(prompts)) == len(prompts)
    assert not set(prompts) & set(neutral_questions() + neutral_questions(split="held"))


def test_the_neutral_material_is_there():
    """Catches package data left out of a wheel."""
    assert len(neutral_questions()) >= 60
    assert len(neutral_text().split()) > 2000


def test_an_unknown_concept_names_the_known_ones():
    """Catches a bare KeyError."""
    with pytest.raises(NotFoundError, match="Bundled: "):
        concept("optimist")


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def rows(n: int, **more):
    return [
        {"prompt": f"p{i}", "preferred": f"yes {i}", "dispreferred": f"no {i}", **more}
        for i in range(n)
    ]


def test_a_stated_split_is_kept_and_an_absent_one_is_made_by_prompt(tmp_path):
    """Catches a split by row, which puts one question on both sides."""
    stated = rows(10)
    for i, row in enumerate(stated):
        row["split"] = "held" if i < 3 else "build"
    pairs = read_pairs(write(tmp_path / "stated.jsonl", stated))
    assert [p.prompt for p in pairs.held] == ["p0", "p1", "p2"]
    doubled = rows(60) + [{**row, "preferred": "other"} for row in rows(60)]
    pairs = read_pairs(write(tmp_path / "made.jsonl", doubled))
    assert not {p.prompt for p in pairs.held} & {p.prompt for p in pairs.build}
    assert 20 <= len(pairs.held) <= 60
    fit, calibration = pairs.fit_and_calibration()
    assert not {p.prompt for p in fit} & {p.prompt for p in calibration}


@pytest.mark.parametrize("n_each", [2, 3, 4, 5])
def test_many_pairs_a_prompt_still_leave_some_for_calibration(tmp_path, n_each):
    """Catches turns counted by pair: with four pairs a prompt none was ever set aside."""
    repeated = [
        {**row, "preferred": f"yes {i} {k}", "split": "build"}
        for i, row in enumerate(rows(16))
        for k in range(n_each)
    ]
    fit, calibration = read_pairs(write(tmp_path / "x.jsonl", repeated)).fit_and_calibration()
    assert len(fit) == 12 * n_each
    assert len(calibration) == 4 * n_each
    assert not {p.prompt for p in fit} & {p.prompt for p in calibration}


def test_texts_without_a_prompt(tmp_path):
    """Catches contrastive texts being refused, or all held because their prompts are equal."""
    texts = [{"positive": f"good {i}", "negative": f"bad {i}"} for i in range(40)]
    pairs = read_pairs(write(tmp_path / "texts.jsonl", texts))
    assert len(pairs.held) > 4
    assert len(pairs.build) > 20
    fit, calibration = pairs.fit_and_calibration()
    assert fit
    assert calibration


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.jsonl:3 is not valid JSON"),
        ("[1]", "x.jsonl:3 is not an object"),
        ('{"prompt": "p", "preferred": "a"}', "x.jsonl:3 has no text under 'dispreferred'"),
        ('{"prompt": "p", "preferred": "a", "dispreferred": "a"}', "same text on both sides"),
        ('{"prompt": "p", "preferred": 5, "dispreferred": "a"}', "no text under 'preferred'"),
        (
            '{"prompt": "p", "preferred": "a", "dispreferred": "b", "split": "test"}',
            "expected 'build' or 'held'",
        ),
        (
            json.dumps({"prompt": "p", "preferred": "a" * 30_000, "dispreferred": "b"}),
            "30000 characters",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    """Catches a bad row being skipped, or an error without its place."""
    good = [json.dumps(row) for row in rows(2)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([*good, line]), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_pairs(path)


def test_too_little_or_unreadable_data_is_refused(tmp_path):
    """Catches a vector built from two pairs, or a stack trace for a missing file."""
    with pytest.raises(DataError, match="at least 4"):
        read_pairs(write(tmp_path / "few.jsonl", rows(2, split="build")))
    with pytest.raises(DataError, match="cannot be read"):
        read_pairs(tmp_path / "none.jsonl")
    mixed = rows(5, split="build") + rows(5)
    with pytest.raises(DataError, match="some lines state"):
        read_pairs(write(tmp_path / "mixed.jsonl", mixed))
