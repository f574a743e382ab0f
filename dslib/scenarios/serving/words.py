"""Tokens into text as they come, without half a character and without the beginning of a stop string.

    words = Words(tokenizer, stop=["END"])
    for token in answer:
        print(words.add(token), end="")
    print(words.rest())

A character may need several tokens, and a tokenizer may write a space or not by what stands before. So a token's text
is the difference of two decoded pieces that begin at the same place, and it waits while it ends in half a character.
"""

from collections.abc import Sequence
from typing import Any

HALF = "\ufffd"  # what a tokenizer writes for bytes that are no character yet


class Words:
    """See the top of this file. ``text`` is what was given out so far."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop, self.text = tokenizer, tuple(stop), ""
        self._tokens: list[int] = []
        self._start = self._known = 0  # decoded again from here; up to here its text is in ``_pending``
        self._pending, self._stopped = "", False

    def add(self, token: int) -> str:
        """What is certain now: nothing for half a character, nor for what may become a stop string."""
        self._tokens.append(token)
        new = self._new()
        if not new.endswith(HALF):
            self._take(new)
        kept = max((n for end in self.stop for n in range(1, len(end)) if self._pending.endswith(end[:n])), default=0)
        return self._give(len(self._pending) - kept)

    def rest(self) -> str:
        """What was kept back, when nothing more comes."""
        self._take(self._new())
        return self._give(len(self._pending))

    def _new(self) -> str:
        decode = lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=True)  # noqa: E731
        before = decode(self._tokens[self._start : self._known])
        return decode(self._tokens[self._start :])[len(before) :]

    def _take(self, new: str) -> None:
        self._start, self._known = self._known, len(self._tokens)
        if self._stopped:
            return
        self._pending += new
        places = [at for end in self.stop if (at := self._pending.find(end)) >= 0]
        if places:
            self._pending, self._stopped = self._pending[: min(places)], True

    def _give(self, count: int) -> str:
        given, self._pending = self._pending[:count], self._pending[count:]
        self.text += given
        return given
