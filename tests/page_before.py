"""The page alone, before a server that runs elsewhere, for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from running_server import listening


@contextmanager
def page_before(url: str) -> Iterator[str]:
    """Give the root of the page's address.

    Ask for it after the server that it speaks to, so that it is closed before that ends.
    """
    from trimtab.ui.page.api import Api
    from trimtab.ui.page.app import page_app

    with listening(page_app(Api(url))) as (address, _):
        yield address
