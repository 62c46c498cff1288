"""What calibration chose as a vector's scale 1, in words."""

from __future__ import annotations

from typing import Any

from trimtab.ui.page.calibration_record import RecordError, read_record
from trimtab.ui.page.layer_heat import damage_text
from trimtab.ui.page.notice import note
from trimtab.ui.page.plain_text import plain
from trimtab.ui.receipt_line import spans


def knee_html(calibration: dict[str, Any]) -> str:
    """Return the sentences on what was chosen, what it does, and whether it is clean.

    Args:
        calibration: the record in a vector's card.
    """
    try:
        record = read_record(calibration)
    except RecordError as error:
        return note(error.message)
    knee = record.knee
    n = len(record.candidates)
    sentences = [
        f"Chosen: {spans(knee.layers)}, {knee.dose:.3f} of the hidden state's length at each, from "
        f"{n} layer set{'' if n == 1 else 's'} on {record.n_pairs} pairs."
    ]
    one = next((point for point in record.points if point.scale == 1.0), None)
    if one is not None:
        sentences.append(
            f"At scale 1 preferred answers gain {record.effect(one):+.2f} nats a token, and "
            f"perplexity on neutral text changes by {damage_text(one.rise)}."
        )
    if knee.is_clean:
        verdict, level = "Clean: the text stays whole at scale 1.", "tt-done"
    else:
        why = knee.problem or "calibration did not say why"
        verdict, level = f"Not clean: {why}. Try it before you rely on it.", "tt-problem"
    text = plain(" ".join(sentences))
    return f'<div class="tt-notice {level}"><p>{text}</p><p><b>{plain(verdict)}</b></p></div>'
