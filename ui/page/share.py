"""The link that brings somebody to the same settings."""

from __future__ import annotations

from html import escape


def share_html(link: str) -> str:
    """Return the link, and the button that copies its whole address.

    Args:
        link: the settings, from `to_link`.
    """
    href = escape(f"?run={link}", quote=True)
    return (
        f'<p class="tt-share"><a id="share-link" href="{href}">Link to these settings</a> '
        "(the prompt is in it; the answers are not)</p>"
    )
