"""Text from token ids as they come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ultramem_ds.data.tokenizers import Tokenizer

_WINDOW = 128  # tokens decoded again with each new one: the cost of a token does not grow
_INCOMPLETE = "\ufffd"  # what a tokenizer shows for a cut UTF-8 sequence


class Detokenizer:
    """Turns a stream of token ids into pieces of text that join to the decoded whole sequence.

    Many tokenizers decode an id differently at the start of a text (its space is lost), so ids are
    decoded together with those before them, the prompt's to begin with. Text that a later token
    may still change waits: a cut character, and bytes of characters without an entry, which some
    libraries show only when the run of bytes ends.

    Args:
        tokenizer: decodes.
        prompt: ids before the first one that is pushed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._shown = self._decode()  # text of the window's ids that has been handed out

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._ids.append(token)
        if self._tokenizer.is_byte(token):
            return ""
        text = self._decode()
        return "" if text.endswith(_INCOMPLETE) else self._show(text)

    def rest(self) -> str:
        """What an unfinished character holds back."""
        return self._show(self._decode())

    def all(self, tokens: Iterable[int]) -> str:
        """The text of all of ``tokens``, pushed one after the other, with the rest."""
        return "".join(map(self.push, tokens)) + self.rest()

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids)

    def _show(self, text: str) -> str:
        same = len(self._shown)
        while not text.startswith(self._shown[:same]):  # bytes that turned out to be no character
            same -= 1
        self._shown = text
        if len(self._ids) >= 2 * _WINDOW:
            kept = self._ids[-_WINDOW:]
            shown = self._tokenizer.decode(kept)
            if shown:  # else what follows would be taken for the start of a text
                self._ids, self._shown = kept, shown
        return text[same:]
