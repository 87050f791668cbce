"""Tokenizers behind one interface: Hugging Face ``tokenizers`` JSON and SentencePiece models.

Both libraries tokenize in native code; nothing here loops over tokens in Python.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from ultramem_ds.utils.files import atomic_file

END_OF_TEXT = "<|endoftext|>"
# Names of the end-of-text token in published tokenizers, the first present one is taken.
_END_OF_TEXT_NAMES = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]")
_REPLACEMENT = "\ufffd"


class Tokenizer(ABC):
    """Text to ids and back; text that spells a special token stays text.

    Attributes:
        file_name: name of the tokenizer's file inside a prepared or run directory.
        vocab_size: one more than the largest id.
        eos_id: id of the end-of-text token that ends every document.
        content: bytes of the file.
        hash: SHA-256 of the file, hexadecimal.
    """

    file_name: str
    vocab_size: int
    eos_id: int

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.hash = hashlib.sha256(content).hexdigest()

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens.

        Raises:
            ValueError: if a text is not encodable as UTF-8 (a lone surrogate).
        """

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; ids of padding rows (>= ``vocab_size``) contribute nothing."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_documents(
        self, texts: Sequence[str], dtype: npt.DTypeLike
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32]]:
        """Encode documents, the end-of-text id appended to each.

        Returns:
            The ids of all documents, concatenated, of ``dtype``; tokens per document, int32.
        """
        encoded = self.encode_batch(texts)
        end = [self.eos_id]
        parts = itertools.chain.from_iterable((ids, end) for ids in encoded)
        lengths = np.fromiter(map(len, encoded), np.int32, len(encoded)) + np.int32(1)
        ids = np.fromiter(itertools.chain.from_iterable(parts), dtype, int(lengths.sum()))
        return ids, lengths

    def save(self, directory: Path) -> Path:
        """Copy the tokenizer's file, byte for byte, into ``directory`` and return its path."""
        path = directory / self.file_name
        save_tokenizer(self, path)
        return path


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the ``tokenizers`` library (GPT-NeoX-20B's, or one of our own)."""

    file_name = "tokenizer.json"

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        backend = Backend.from_str(content.decode())
        eos = _choose_eos(backend)
        description = json.loads(content)
        plain = [t for t in description["added_tokens"] if t["content"] == eos and not t["special"]]
        if plain:
            # It would be recognised inside documents' text.
            plain[0]["special"] = True
            backend = Backend.from_str(json.dumps(description))
        backend.encode_special_tokens = True
        backend.no_truncation()  # a file may carry a maximum length, which would cut documents
        backend.no_padding()
        self._backend = backend
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = int(backend.get_vocab(with_added_tokens=True)[eos])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Tokenizer`."""
        try:
            # The "fast" form does without character offsets; the ids are the same.
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError as error:
            raise ValueError(f"text cannot be encoded as UTF-8: {error}") from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See :class:`Tokenizer`."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special)
        return text


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` (Llama's kind)."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes) -> None:
        import sentencepiece

        super().__init__(content)
        self._backend = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = self._backend.get_piece_size()
        self.eos_id = self._backend.eos_id()
        if self.eos_id < 0:
            raise ValueError("the SentencePiece model has no end-of-sentence piece")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See :class:`Tokenizer`."""
        try:
            ids: list[list[int]] = self._backend.encode(list(texts), out_type=int, num_threads=1)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"text cannot be encoded as UTF-8: {error}") from error
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """See :class:`Tokenizer`."""
        kept = [
            token
            for token in map(int, ids)
            if token < self.vocab_size and not (skip_special and self._backend.is_control(token))
        ]
        text: str = self._backend.decode(kept)
        return text


class StreamDecoder:
    """Text of a growing id sequence, piece by piece: what generation prints as it goes.

    A character whose bytes are spread over several tokens appears once, when it is complete.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._begin = 0  # ids before this one are out of the window
        self._done = 0  # ids before this one are printed

    def push(self, token: int) -> str:
        """Add one id; returns the text it completes, possibly empty."""
        self._ids.append(token)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._begin, self._done = self._done, len(self._ids)
        return text

    def flush(self) -> str:
        """Text still held back at the end, undecodable bytes as U+FFFD."""
        text = self._pending()
        self._begin = self._done = len(self._ids)
        return text

    def _pending(self) -> str:
        # Decoded with the previous piece in front: a first piece may lose its leading space.
        before = self._tokenizer.decode(self._ids[self._begin : self._done])
        return self._tokenizer.decode(self._ids[self._begin :])[len(before) :]


def _choose_eos(backend: Backend) -> str:
    for name in _END_OF_TEXT_NAMES:
        if backend.token_to_id(name) is not None:
            return name
    raise ValueError(f"it has no end-of-text token, none of {', '.join(_END_OF_TEXT_NAMES)}")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a ``tokenizers`` JSON file, a SentencePiece ``.model`` file, a directory that holds
            ``tokenizer.json`` or ``tokenizer.model`` (a prepared, run or checkpoint directory),
            or, when a network is there, a Hugging Face model id such as EleutherAI/gpt-neox-20b.

    Raises:
        ValueError: if it is none of these; the message says which was tried.
    """
    file = Path(path)
    if file.is_dir():
        candidates = [
            file / kind.file_name for kind in (HuggingFaceTokenizer, SentencePieceTokenizer)
        ]
        present = [candidate for candidate in candidates if candidate.is_file()]
        if not present:
            raise ValueError(
                f"{file} holds neither tokenizer.json nor tokenizer.model; "
                "repeat `prepare`, or copy the tokenizer there"
            )
        file = present[0]
    if file.is_file():
        return _from_bytes(file.read_bytes(), str(file))
    if isinstance(path, str) and path.count("/") == 1 and not path.startswith(("/", ".")):
        return _from_bytes(_download(path), path)
    raise ValueError(f"tokenizer file {path} does not exist")


def _from_bytes(content: bytes, name: str) -> Tokenizer:
    kind = HuggingFaceTokenizer if content.lstrip()[:1] == b"{" else SentencePieceTokenizer
    try:
        return kind(content)
    except Exception as error:  # both libraries raise bare Exception or RuntimeError on bad files
        raise ValueError(f"{name} is not a usable tokenizer: {error}") from error


def _download(model_id: str) -> bytes:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model_id, HuggingFaceTokenizer.file_name)).read_bytes()
    except Exception as error:  # offline, unknown id, no such file: many exception types
        raise ValueError(
            f"{model_id} is no local file, and as a Hugging Face id it failed: {error}"
        ) from error


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer's file, byte for byte, to ``path``."""
    with atomic_file(path) as out:
        out.write(tokenizer.content)
