"""A request's query: known parameters, each once."""

from __future__ import annotations

from fastapi import Request as HttpRequest

from trimtab.serving.errors import RequestError


def check_query(http: HttpRequest, *, known: tuple[str, ...]) -> None:
    """Refuse a parameter that is misspelt or given twice; it would be ignored otherwise.

    Raises:
        RequestError: naming the parameter.
    """
    given = [name for name, _ in http.query_params.multi_items()]
    for name in given:
        if name not in known:
            raise RequestError(
                f"Unknown parameter {name[:80]!r}; {http.url.path} takes {', '.join(known)}.",
                param=name[:80],
            )
        if given.count(name) > 1:
            raise RequestError(f"Parameter {name!r} is given twice.", param=name)


def layer_of(text: str | None) -> int | None:
    """Return the number in a query's `layer`, None without one.

    Raises:
        RequestError: it is no number.
    """
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 6):
        raise RequestError(
            f"layer is {text[:80]!r}; expected a layer's number, counted from 0.", param="layer"
        )
    return int(text)
