"""Examples that people paste: every form comes to the same rows, and faults are told by line."""

from __future__ import annotations

import json

import pytest

from trimtab.steering.errors import DataError, TrimtabError
from trimtab.ui.page.build_form import FormError, named, options_of
from trimtab.ui.page.download import file_value
from trimtab.ui.page.pasted import MAX_CHARS, pasted_pairs, pasted_texts
from trimtab.ui.page.upload import UploadError
from trimtab.ui.page.uploaded_text import uploaded_text

ROWS = [
    {"prompt": f"How is {thing}?", "preferred": f"{thing} is good", "dispreferred": f"{thing} bad"}
    for thing in ("rain", "tea", "music", "chess", "bread", "winter", "a train", "the sea")
]


@pytest.mark.parametrize("mark", [" || ", "||", "\t", "\t\t"])
def test_columns_and_json_are_the_same_pairs(mark):
    """Catches a form of columns whose prompt, order or spaces come out otherwise."""
    columns = "\n\n".join(mark.join(row.values()) for row in ROWS)
    lines = "\n".join(map(json.dumps, ROWS))
    assert pasted_pairs(columns).rows == ROWS == pasted_pairs(lines).rows


def test_two_columns_are_texts_without_a_prompt():
    """Catches two columns read as a prompt and an answer."""
    text = "\n".join(f"{row['preferred']} || {row['dispreferred']}" for row in ROWS)
    assert pasted_pairs(text).rows[0] == {"positive": "rain is good", "negative": "rain bad"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("only one column", "Line 4 is neither JSON nor"),
        ("a || b || c || d", "Line 4 is neither JSON nor"),
        ('{"prompt": "a",', "Line 4 is not valid JSON"),
        ('{"prompt": "a", "preferred": "b"}', "Line 4 has no text under 'dispreferred'"),
        ("the same || the same", "Line 4 has the same text on both sides"),
        ('{"a":' * 100_000, "Line 4 is not valid JSON"),
    ],
)
def test_a_broken_line_is_named(line, said):
    """Catches a fault told by the row's number, which blank lines make another one."""
    good = [json.dumps(row) for row in ROWS]
    with pytest.raises(DataError, match=said):
        pasted_pairs("\n".join([good[0], "", good[1], line, *good[2:]]))


@pytest.mark.parametrize("text", ["", "  \n\n", "a || b", "x" * (MAX_CHARS + 1)])
def test_too_little_and_too_much_are_refused(text):
    """Catches a build that is sent with nothing in it, or a field without a limit."""
    with pytest.raises(TrimtabError):
        pasted_pairs(text)


def test_labelled_texts_in_both_forms():
    """Catches label and text in each other's place."""
    pasted = pasted_texts('sad || It rains.\n\n{"text": "It shines.", "label": "glad"}')
    assert pasted.rows == [
        {"label": "sad", "text": "It rains."},
        {"text": "It shines.", "label": "glad"},
    ]
    with pytest.raises(DataError, match="Line 2"):
        pasted_texts('sad || It rains.\n{"text": "no label"}')


def test_the_servers_paths_become_lines():
    """Catches a refusal that counts from 0, or counts rows where people count lines."""
    pasted = pasted_pairs("\n\n" + "\n\n".join(map(json.dumps, ROWS)))
    assert pasted.in_lines("pairs[2] is too long") == "line 7 is too long"
    assert pasted.in_lines("texts[0].label is unknown") == "line 3, 'label', is unknown"
    assert pasted.in_lines("pairs[99] and id") == "pairs[99] and id"


def test_options_are_json_or_text():
    """Catches a number sent as text, or a line without a value that is passed over."""
    assert options_of("c = 0.1\n\n pairing = diff ") == {"c": 0.1, "pairing": "diff"}
    for broken in ("c", "= 1", "c =", "c = 1\nc = 2"):
        with pytest.raises(FormError):
            options_of(broken)


def test_a_name_is_asked_for():
    """Catches a build without a name, or a bundled one that must be typed."""
    assert named("  mine ") == "mine"
    assert named(" ", otherwise="warm") == "warm"
    with pytest.raises(FormError):
        named("  ")


@pytest.mark.parametrize("name", ["two words", "a/b", "../up", "-x", "ärger", "n" * 65])
def test_a_name_that_cannot_be_one_says_what_may(name):
    """Catches a regular expression in place of a sentence."""
    with pytest.raises(TrimtabError, match="use letters, digits") as caught:
        named(name)
    assert "^" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b" \r\n"])
def test_an_empty_file_is_not_taken_for_examples(data):
    """Catches what was typed being replaced by nothing, and called done."""
    with pytest.raises(UploadError, match="is empty"):
        uploaded_text(file_value("pairs.txt", data))
