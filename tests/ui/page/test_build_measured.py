"""Heat maps, curves and confusion matrices: what they mark, escape, and refuse to draw."""

from __future__ import annotations

import copy
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from trimtab.ui.page.build_view import end_html, progress_html, result_html, stage_html
from trimtab.ui.page.confusion import confusion_html
from trimtab.ui.page.curve import curve_html
from trimtab.ui.page.knee import knee_html
from trimtab.ui.page.layer_heat import layer_heat_html
from trimtab.ui.page.scores import doses_html, scores_html

HOSTILE = "<img src=x onerror=alert(1)>\"'"


def tree(html: str) -> ElementTree.Element:
    """Parse what is drawn; text that was not escaped is either an element of it or an error."""
    return ElementTree.fromstring(f"<div>{html}</div>")


def calibration(**changes: Any) -> dict[str, Any]:
    """A record on layers 4 and 5 to 6, whose effect is a tenth of the scale."""
    return {
        "criteria": {"max_rise": 0.08},
        "n_pairs": 9,
        "candidates": [
            {"layers": [4], "dose": 0.1, "effect": 0.2},
            {"layers": [5, 6], "dose": 0.05, "effect": 0.4},
        ],
        "curve": [
            {"scale": float(s), "margin": 0.5 + s / 10, "rise": s * s / 25}
            for s in (4, -1, 0, 1, 2)
        ],
        "knee": {"layers": [5, 6], "dose": 0.05, "is_clean": True, "problem": None},
        **changes,
    }


MAP = {
    "layers": [[4], [5, 6]],
    "scales": [-1.0, 1.0, 4.0],
    "dose": 0.05,
    "effect": [[-0.1, 0.1, 0.4], [-0.2, 0.2, None]],
    "rise": [[0.01, 0.02, 0.5], [0.02, 0.04, None]],
}


def marked(html: str) -> list[str]:
    """Return the texts of the cells that are outlined."""
    cells = tree(html).iter("td")
    return ["".join(cell.itertext()) for cell in cells if cell.get("class") == "tt-knee"]


def test_the_knee_is_marked_once_in_each_map():
    """Catches an outline on another layer set or another scale, or on none."""
    assert marked(layer_heat_html(calibration(map=MAP))) == ["◆+0.20", "◆+4%"]


def test_every_cell_of_a_map_has_its_number_and_a_title():
    """Catches a cell whose colour alone tells, rows against columns, and a hole that is drawn."""
    effect, damage = tree(layer_heat_html(calibration(map=MAP))).iter("tbody")
    rows = [["".join(cell.itertext()) for cell in row] for row in effect]
    assert rows == [["4", "-0.10", "+0.10", "+0.40"], ["5-6", "-0.20", "◆+0.20", "-"]]
    assert [cell.text for cell in damage[0]] == ["4", "+1%", "+2%", "+50%"]
    assert all("layer" in (cell.get("title") or "") for cell in effect.iter("td"))
    assert "not finite" in str(effect[1][3].get("title"))


def test_colours_grow_with_the_numbers_and_turn_with_their_sign():
    """Catches a scale that is not shared, or orange for what goes toward the concept."""
    effect, damage = tree(layer_heat_html(calibration(map=MAP))).iter("tbody")
    colour = re.compile(r"var\((.*)\) (\d+)%")

    def shades(row):
        found = [colour.search(str(cell.get("style"))) for cell in row.iter("td")]
        return [(match[1], int(match[2])) for match in found if match]

    away, toward = "--tt-heat-against", "--tt-heat-for"
    assert shades(effect[0]) == [(away, 25), (toward, 25), (toward, 100)]
    assert [name for name, _ in shades(damage[0])] == [away] * 3
    # Full at four times what calibration accepts.
    assert [share for _, share in shades(damage[0])] == [3, 6, 100]


def test_an_older_record_shows_the_layers_it_compared():
    """Catches a page that draws nothing for vectors built without a map."""
    html = layer_heat_html(calibration())
    assert marked(html) == ["◆+0.40"]
    assert "not mapped" in html


def test_the_curve_counts_effect_from_scale_0():
    """Catches margins shown as effects, or points in the record's order."""
    html = curve_html(calibration())
    (body,) = tree(html).iter("tbody")
    rows = [["".join(cell.itertext()) for cell in row] for row in body]
    assert [row[0] for row in rows] == ["-1", "0", "+1", "+2", "+4"]
    assert [row[2] for row in rows] == ["-0.10", "+0.00", "◆+0.10", "+0.20", "+0.40"]
    assert [row[3] for row in rows] == ["+4%", "+0%", "+4%", "+16%", "+64%"]


def test_the_picture_stays_in_its_frame():
    """Catches a broken model's perplexity, or effects that all go down, drawn off the page."""
    record = calibration()
    record["curve"][0]["rise"] = 4000.0
    for point in record["curve"]:
        point["margin"] = -abs(point["margin"])
    svg = next(iter(tree(curve_html(record)).iter("svg")))
    _, _, width, height = map(float, str(svg.get("viewBox")).split())
    places = [
        tuple(map(float, place.split(",")))
        for line in svg.iter("polyline")
        for place in str(line.get("points")).split()
    ]
    assert len(places) == 10
    assert all(0 <= x <= width and 0 <= y <= height for x, y in places)


def test_what_was_chosen_is_said_and_whether_it_is_clean():
    """Catches a vector that breaks the text at scale 1 and is shown as good."""
    assert "Clean:" in knee_html(calibration())
    knee = {"layers": [4], "dose": 0.1, "is_clean": False, "problem": f"it loops {HOSTILE}"}
    html = knee_html(calibration(knee=knee))
    text = "".join(tree(html).itertext())
    assert "Not clean: it loops <img" in text
    assert "layer 4" in text
    assert "tt-problem" in html


BROKEN = [
    {},
    {"curve": "none"},
    calibration(curve=[]),
    calibration(curve=[{"scale": float("nan"), "margin": 0, "rise": 0}] * 3),
    calibration(map={**MAP, "effect": [[1.0]]}),
    calibration(map={**MAP, "rise": [[HOSTILE] * 3] * 2}),
    calibration(knee={"layers": [HOSTILE], "dose": 0.1, "is_clean": True}),
    calibration(candidates=[{"layers": [4], "dose": None, "effect": 1}]),
]


@pytest.mark.parametrize("record", BROKEN)
def test_a_record_of_another_form_is_told(record):
    """Catches an imported file that takes the page down, or whose text gets into it."""
    for draw in (layer_heat_html, curve_html, knee_html):
        html = draw(copy.deepcopy(record))
        assert "cannot be drawn" in html
        assert "<img" not in html


def classifier(**changes: Any) -> dict[str, Any]:
    """A classifier's card whose second label is a hostile one."""
    scores = {
        "n": 10,
        "accuracy": 0.7,
        "macro_f1": 0.6,
        "auroc": {"glad": 0.9, HOSTILE: None},
        "ece": 0.1,
        "log_loss": 0.5,
        "confusion": [[3, 1], [2, 4]],
    }
    return {
        "id": "mood",
        "labels": ["glad", HOSTILE],
        "probe_layer": 5,
        "default_layers": [4, 5],
        "metrics": {"4": {**scores, "accuracy": 0.5}, "5": scores},
        "doses": [
            {
                "target": [HOSTILE],
                "avoid": [],
                "picks_rival": True,
                "is_reflection": False,
                "dose": 0.25,
            }
        ],
        **changes,
    }


def test_confusion_gives_shares_of_the_truth():
    """Catches rows and columns in each other's place, or shares of the whole."""
    html = confusion_html(classifier())
    (body,) = tree(html).iter("tbody")
    rows = [[cell.text for cell in row] for row in body]
    assert rows == [["glad", "75% (3)", "25% (1)"], [HOSTILE, "33% (2)", "67% (4)"]]
    heads = [cell.get("scope") for cell in tree(html).iter("th")]
    assert heads == ["col"] * 3 + ["row"] * 2
    blue = ["heat-for" in str(cell.get("style")) for cell in body.iter("td")]
    assert blue == [True, False, False, True]


def test_labels_that_do_not_exclude_one_another_have_a_row_each():
    """Catches a multi-label classifier shown as not measured, or misses of the wrong texts."""
    counts = {"tp": 3, "fp": 2, "fn": 1, "tn": 4}
    metrics = {"5": {"n": 10, "counts": {"glad": counts, HOSTILE: counts}, "auroc": {"glad": 0.9}}}
    (body,) = tree(confusion_html(classifier(metrics=metrics))).iter("tbody")
    assert [cell.text for cell in body[0]] == ["glad", "75% (3)", "25% (1)", "33% (2)", "0.90"]


@pytest.mark.parametrize(
    "metrics",
    [
        {"5": {"confusion": [[1]]}},
        {"5": {"confusion": [[-1, 0], [0, 1]]}},
        {"5": {"confusion": HOSTILE}},
        {"5": {"counts": {"other": {}}}},
        {"5": {"accuracy": 1.0}},
        {"5": 3},
    ],
)
def test_measures_of_another_form_are_told(metrics):
    """Catches an imported classifier that takes the page down."""
    html = confusion_html(classifier(metrics=metrics))
    assert "cannot be drawn" in html
    assert "<img" not in html


def test_scores_and_doses_mark_the_layer_that_probes_read():
    """Catches the mark on another layer, and a label that becomes part of the page."""
    assert marked(scores_html(classifier())) == ["◆70.0%"]
    (body,) = tree(doses_html(classifier())).iter("tbody")
    assert [cell.text for cell in body[0]] == [HOSTILE, "likeliest other", "steps", "0.25"]
    assert "no dose" in doses_html(classifier(doses=[])).lower()
    assert "Not measured" in scores_html(classifier(metrics={}))
    assert "cannot be drawn" in scores_html(classifier(metrics={"x": 1}))


def state(**changes: Any) -> dict[str, Any]:
    """A build's state on the wire."""
    return {
        "id": "build-1",
        "kind": "vector",
        "artifact": "warm",
        "status": "running",
        "stage": HOSTILE,
        "done": 3,
        "total": 10,
        "position": 0,
        "elapsed_s": 12.3,
        "error": None,
        "result": None,
        **changes,
    }


def test_progress_is_a_bar_and_words():
    """Catches a bar without its numbers, or one that claims a length before it is known."""
    (bar,) = tree(progress_html(state())).iter("progress")
    assert (bar.get("value"), bar.get("max")) == ("3", "10")
    assert "3 of 10, 12 s" in progress_html(state())
    (bar,) = tree(progress_html(state(total=0))).iter("progress")
    assert bar.get("value") is None
    assert HOSTILE in "".join(tree(stage_html(state())).itertext())
    assert stage_html(state(done=3)) == stage_html(state(done=4, elapsed_s=13.0))


@pytest.mark.parametrize("status", ["done", "failed", "cancelled"])
def test_an_end_says_what_was_stored(status):
    """Catches a failed or cancelled build that reads as if there were a vector now."""
    error = {"message": f"Too few pairs. {HOSTILE}"} if status == "failed" else None
    text = "".join(tree(end_html(state(status=status, error=error))).itertext())
    assert ("nothing was stored" in text) == (status != "done")
    assert ("Too few pairs" in text) == (status == "failed")
    assert progress_html(state(status=status)) == ""


def test_a_classifier_that_was_not_calibrated_is_done_with_a_problem():
    """Catches the server's word on a missing calibration, which comes with a result, unsaid."""
    html = end_html(state(status="done", kind="classifier", error={"message": "not calibrated"}))
    assert "is built and stored" in html
    assert "tt-problem" in html


def test_a_result_without_calibration_says_so():
    """Catches an uncalibrated vector that is shown as an empty place."""
    card = {"id": "warm", "calibration": None, "default_layers": [15]}
    assert "Not calibrated" in result_html(state(status="done", result=card))
    card["calibration"] = calibration(map=MAP)
    assert len(list(tree(result_html(state(status="done", result=card))).iter("svg"))) == 1
