"""Text of strangers, shown so that all of it can be seen and none of it is obeyed."""

from __future__ import annotations

import unicodedata


def visible(text: str, *, mark: str = "↵") -> str:
    """Return a text whose invisible characters can be seen and do nothing to what is around.

    Line ends get a mark and stay. Control characters, which a terminal would obey, and those
    that reorder the text around them, become marks.
    """
    return "".join(_shown(character, mark) for character in text)


def _shown(character: str, mark: str) -> str:
    code = ord(character)
    if character == "\n":
        return f"{mark}\n"
    if character == "\t":
        return "⇥\t"
    if code < 0x20:
        return chr(0x2400 + code)
    is_control = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    reorders = 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
    return f"⟨U+{code:04X}⟩" if is_control or reorders else character
