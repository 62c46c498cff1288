"""Text of strangers (prompts, answers, names, a server's words) within the page's HTML."""

from __future__ import annotations

from html import escape

from trimtab.ui.visible_text import visible


def plain(text: str) -> str:
    """Return a text as HTML that shows it, in an element or an attribute, and obeys none of it."""
    return escape(visible(text, mark=""))
