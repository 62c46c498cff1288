"""Two attributions of one answer, subtracted token by token."""

from __future__ import annotations

import pytest
from attribution_wire import wire

from trimtab.steering.errors import DataError
from trimtab.ui.attribution_difference import Difference
from trimtab.ui.attribution_report import Report
from trimtab.ui.token_heat import prompt_html

TOKENS = (("<s>", None), ("a", 2.0), ("", 0.5), ("日", -1.5), ("b", 0.25))
ONE = Report(wire(*TOKENS))
OTHER = Report(wire(("<s>", None), ("a", 0.5), ("", -0.5), ("日", -1.0), ("b", 0.25)))


def scores(difference: Difference) -> list[float | None]:
    return [token["score"] for token in difference.tokens]


def test_it_is_steered_minus_unsteered_at_every_token():
    """Catches the sign turned, and template tokens that get a score of zero."""
    assert scores(Difference(ONE, OTHER)) == [None, 1.5, 1.0, -0.5, 0.0]
    assert scores(Difference(OTHER, ONE)) == [None, -1.5, -1.0, 0.5, 0.0]


def test_its_sum_is_the_difference_of_the_sums():
    """Catches a token that is dropped, or counted twice where tokens share a character."""
    difference = Difference(ONE, OTHER)
    sums = ONE.result["summary"]["sum"] - OTHER.result["summary"]["sum"]
    assert sum(piece.score for piece in difference.scored) == pytest.approx(sums)
    assert [piece.text for piece in difference.scored] == ["a", "日", "b"]
    assert f"({sums:+.3f})" in difference.summary


def test_a_piece_tells_what_it_is_the_difference_of():
    """Catches figures of the neighbouring token, and bytes of a character left out of one side."""
    difference = Difference(ONE, OTHER)
    told = [difference.account(piece) for piece in difference.pieces if piece.score is not None]
    assert told[1] == "+0.500000, from -1.500000 unsteered to -1.000000 steered"


def test_steering_that_does_nothing_has_no_colour():
    """Catches noise drawn as if it were a change."""
    html = prompt_html(Difference(ONE, ONE).on_one_scale())
    assert html.count("tt-a0") == 3
    assert "tt-p" not in html


def test_one_scale_makes_colours_comparable():
    """Catches equal scores in unequal colours, and a difference that is cut off at its end."""
    far = Report(wire(("<s>", None), ("a", -2.0), ("", 0.5), ("日", -1.5), ("b", 0.25)))
    shown = Difference(ONE, far).on_one_scale()
    maps = (shown, shown.steered, shown.unsteered)
    assert len({one.end for one in maps}) == 1
    assert shown.end == Difference(ONE, far).end
    same = [one.share(one.pieces[-1]) for one in maps[1:]]
    assert same[0] == same[1] == 0.25 / shown.end


@pytest.mark.parametrize(
    "other",
    [
        wire(("<s>", None), ("a", 2.0)),
        wire(("<s>", 1.0), ("a", 2.0), ("", 0.5), ("日", -1.5), ("b", 0.25)),
        wire(*TOKENS, summary={"units": "share"}),
    ],
)
def test_what_cannot_be_compared_is_refused(other):
    """Catches scores of one prompt subtracted from those of another."""
    with pytest.raises(DataError, match="cannot be compared"):
        Difference(ONE, Report(other))
