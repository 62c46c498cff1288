"""Incremental text: whole characters, nothing lost, stop strings never shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_chat import byte_tokenizer

from trimtab.serving.detokenizer import Detokenizer

BYTES = byte_tokenizer()


def run(text: str, *, stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(BYTES, stop=stop)
    pieces = []
    for token in BYTES(text)["input_ids"]:
        pieces.append(detokenizer.push(token))
        if detokenizer.stopped_by is not None:
            break
    pieces.append(detokenizer.finish())
    return pieces, detokenizer


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_the_pieces_are_the_text(text):
    """Catches lost, doubled or broken characters between tokens."""
    pieces, detokenizer = run(text)
    assert "".join(pieces) == text
    assert detokenizer.text == text


def test_no_piece_holds_half_a_character():
    """Catches sending the replacement character in place of an unfinished one."""
    pieces, _ = run("naïve 日本 🙂 end")
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    """Catches swallowing the last bytes when the sequence ends inside a character."""
    detokenizer = Detokenizer(BYTES)
    first = BYTES("é")["input_ids"][0]
    assert detokenizer.push(first) == ""
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("stop", ["END", "ND", "xEN", "\n\n"])
def test_a_stop_string_ends_the_text_before_it(stop):
    """Catches a stop string split over tokens being partly sent."""
    text = "one two xEND\n\nmore"
    pieces, detokenizer = run(text, stop=(stop,))
    assert "".join(pieces) == text[: text.index(stop)]
    assert detokenizer.stopped_by == stop


def test_the_earliest_of_several_stop_strings_wins():
    """Catches taking the first listed instead of the first to occur."""
    pieces, detokenizer = run("abcdef", stop=("f", "cd"))
    assert "".join(pieces) == "ab"
    assert detokenizer.stopped_by == "cd"


def test_a_false_start_of_a_stop_string_is_sent_after_all():
    """Catches text held back as a possible stop string and then forgotten."""
    pieces, _ = run("STOP? STO", stop=("STOPPED",))
    assert "".join(pieces) == "STOP? STO"


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab", max_size=20), st.text(alphabet="ab", min_size=1, max_size=4))
def test_stop_strings_against_find(text, stop):
    """Catches any disagreement with a plain search in the whole text."""
    pieces, _ = run(text, stop=(stop,))
    at = text.find(stop)
    assert "".join(pieces) == (text if at < 0 else text[:at])
