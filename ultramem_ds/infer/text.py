"""Text from token ids as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_WINDOW = 16  # tokens decoded again with each new one: the cost of a token does not grow
_INCOMPLETE = "\ufffd"  # what a tokenizer shows for a cut UTF-8 sequence


class Detokenizer:
    """Turns a stream of token ids into pieces of text that join to the whole.

    A token may hold part of a character, or lose its leading space at the start of a decode, so
    that each is decoded together with those before it, and an incomplete character waits.

    Args:
        decode: token ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._shown = ""  # text of the window's ids that has been handed out

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_INCOMPLETE):
            return ""
        piece = text[len(self._shown) :]
        self._shown = text
        if len(self._ids) >= 2 * _WINDOW:
            self._ids = self._ids[-_WINDOW:]
            self._shown = self._decode(self._ids)
        return piece

    def rest(self) -> str:
        """What an unfinished character holds back."""
        return self._decode(self._ids)[len(self._shown) :]
