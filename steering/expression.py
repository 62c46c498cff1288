"""A spec's string form: signed, optionally scaled names, as in `"0.8 honest - tone/casual"`."""

from __future__ import annotations

import re
from typing import Any

from trimtab.steering.errors import SpecError

MAX_EXPRESSION = 16_384
_EXAMPLE = '"0.8 honest - 0.3 formal" or "tone/empathetic - tone/casual"'

# Possessive quantifiers: a long run of digits or spaces must not make the match quadratic.
_TERM = re.compile(
    r"""\s*+(?P<sign>[+-])?\s*+
        (?:(?P<scale>(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?)(?:\s*+\*\s*+|\s++))?
        (?P<id>[A-Za-z][A-Za-z0-9._-]*+)(?:/(?P<label>[A-Za-z0-9][A-Za-z0-9._-]*+))?""",
    re.VERBOSE,
)


def read_expression(text: str, *, path: str, max_terms: int) -> dict[str, Any]:
    """Return the object that an expression stands for, unchecked.

    A name adds a vector. `classifier/label` steers toward a label, with a minus away from it; the
    labels of one classifier make one term of guidance, so they have one scale.

    Args:
        text: the expression.
        path: JSON path of the text, for errors.
        max_terms: most names.

    Raises:
        SpecError: naming the place in the text where reading stopped, or two scales at odds.
    """
    if not text.strip():
        raise SpecError(f"{path} is an empty string; name at least one vector.", param=path)
    if len(text) > MAX_EXPRESSION:
        raise SpecError(
            f"{path} has {len(text)} characters; at most {MAX_EXPRESSION} are allowed.", param=path
        )
    vectors: list[dict[str, Any]] = []
    guidance: dict[str, dict[str, Any]] = {}
    at = n_terms = 0
    while at < len(text.rstrip()):
        found = _TERM.match(text, at)
        if found is None or (n_terms and found["sign"] is None):
            raise SpecError(
                f"{path} could not be read at {text[at : at + 20]!r}; write terms such as "
                f"{_EXAMPLE}.",
                param=path,
            )
        at, n_terms = found.end(), n_terms + 1
        if n_terms > max_terms:
            raise SpecError(f"{path} has more than {max_terms} terms.", param=path)
        is_minus = found["sign"] == "-"
        scale = float(found["scale"] or 1.0)
        if found["label"] is None:
            vectors.append({"id": found["id"], "scale": -scale if is_minus else scale})
            continue
        name = found["id"]
        term = guidance.setdefault(name, {"classifier": name, "target": [], "avoid": []})
        if found["scale"] and term.setdefault("scale", scale) != scale:
            raise SpecError(
                f"{path}: the labels of classifier {name!r} share one scale; it has "
                f"{term['scale']:g} and {scale:g}.",
                param=path,
            )
        term["avoid" if is_minus else "target"].append(found["label"])
    return {"vectors": vectors, "guidance": list(guidance.values())}
