"""Text of a growing sequence: whole characters only, stop strings found before they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Turn tokens into text one at a time.

    A token may end inside a character; such bytes are held back until the character is whole.
    Text that could be the beginning of a stop string is held back too, so that nothing which
    belongs to one is ever sent.

    Args:
        tokenizer: a Hugging Face tokenizer.
        stop: strings that end the text.
    """

    # Tokens decoded before the new one, so that joining rules (leading spaces) apply to it.
    _CONTEXT = 6

    def __init__(self, tokenizer: Any, *, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._hold = max((len(s) for s in self._stop), default=1) - 1
        self._ids: list[int] = []
        self._known = 0  # tokens whose text is in `_text`
        self._text = ""
        self._sent = 0
        self.stopped_by: str | None = None

    @property
    def text(self) -> str:
        """All text so far, up to a stop string if one was found."""
        return self._text

    def push(self, token_id: int) -> str:
        """Add a token and return the text that can be sent now."""
        self._ids.append(token_id)
        new = self._new_text()
        if new.endswith(_REPLACEMENT) and len(self._ids) - self._known < 8:
            return ""  # inside a character; eight tokens without an end is not text
        return self._append(new)

    def finish(self) -> str:
        """Return what was held back, after the last token."""
        before = self._sent
        if self.stopped_by is None and self._known < len(self._ids):
            self._append(self._new_text())
        self._sent = len(self._text)
        return self._text[before:]

    def _new_text(self) -> str:
        begin = max(0, self._known - self._CONTEXT)
        known = self._decode(self._ids[begin : self._known])
        return self._decode(self._ids[begin:])[len(known) :]

    def _append(self, new: str) -> str:
        self._known = len(self._ids)
        searched = max(0, len(self._text) - self._hold)
        self._text += new
        found = [(at, s) for s in self._stop if (at := self._text.find(s, searched)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self._text = self._text[:at]
        end = len(self._text)
        if not found:
            end -= self._held_back()
        sent = self._text[self._sent : max(self._sent, end)]
        self._sent = max(self._sent, end)
        return sent

    def _held_back(self) -> int:
        for n in range(min(self._hold, len(self._text)), 0, -1):
            tail = self._text[-n:]
            if any(s.startswith(tail) for s in self._stop):
                return n
        return 0

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class TokenText:
    """Text of single tokens, for logprobs; remembers what it has decoded."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode = lru_cache(maxsize=65536)(lambda i: str(tokenizer.decode([i])))

    def __call__(self, token_id: int) -> str:
        """Return the token's text decoded alone."""
        return self._decode(token_id)
