"""Tokenizers behind one interface: Hugging Face ``tokenizers`` JSON and SentencePiece models.

Both libraries tokenize in native code; nothing here loops over tokens in Python. Which file is
what, and which token ends a text, is found in ``tokenizer_files``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer as Backend

from ultramem_ds.data.tokenizer_files import (
    CONFIG_NAME,
    NO_CLUES,
    Clues,
    EndOfText,
    clues_beside,
    config_naming,
    find_file,
    refuse_other_kinds,
    without_bom,
)
from ultramem_ds.data.tokenizer_losses import refuse_if_unencodable
from ultramem_ds.utils.files import atomic_file

END_OF_TEXT = "<|endoftext|>"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Tokenizer(ABC):
    """Text to ids and back; text that spells a special token stays text.

    Attributes:
        file_name: name of the tokenizer's file inside a prepared or run directory.
        vocab_size: one more than the largest id.
        eos_id: id of the end-of-text token that ends every document.
        end_of_text: the same as text, and what says so.
        unknown_id: id of the token for characters that it does not know; None without one.
        content: bytes of the file.
        hash: SHA-256 of the file, hexadecimal.
        config: bytes of the ``tokenizer_config.json`` that goes with it; None without one.
    """

    file_name: str
    vocab_size: int
    eos_id: int
    end_of_text: EndOfText
    unknown_id: int | None

    def __init__(self, content: bytes, config: bytes | None = None) -> None:
        self.content = content
        self.config = config
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

    @abstractmethod
    def is_byte(self, token: int) -> bool:
        """Whether an id stands for one byte of a character that has no entry."""

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
        """Copy the tokenizer's files into ``directory``, which then loads as this tokenizer.

        The tokenizer's own file is copied byte for byte, and so is its ``tokenizer_config.json``
        unless another end-of-text token was chosen than the one it names.

        Returns:
            The path of the tokenizer's own file.
        """
        path = directory / self.file_name
        save_tokenizer(self, path)
        config = config_naming(
            self.config, self.end_of_text.token, keep=not self.end_of_text.source
        )
        if config is not None:
            with atomic_file(directory / CONFIG_NAME) as out:
                out.write(config)
        return path


class HuggingFaceTokenizer(Tokenizer):
    """A ``tokenizer.json`` of the ``tokenizers`` library (GPT-NeoX-20B's, or one of our own)."""

    file_name = "tokenizer.json"

    def __init__(self, content: bytes, clues: Clues = NO_CLUES) -> None:
        super().__init__(content, clues.config)
        backend = Backend.from_str(content.decode())
        self.end_of_text = clues.end_of_text(
            lambda name: backend.token_to_id(name) is not None, backend.id_to_token
        )
        eos = self.end_of_text.token
        description = json.loads(content)
        added = [t for t in description["added_tokens"] if t["content"] == eos]
        if added and not added[0]["special"]:
            # It would be recognised inside documents' text.
            added[0]["special"] = True
            backend = Backend.from_str(json.dumps(description))
        backend.encode_special_tokens = True
        backend.no_truncation()  # a file may carry a maximum length, which would cut documents
        backend.no_padding()
        self._backend = backend
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = int(vocabulary[eos])
        model = description["model"]
        unknown = model.get("unk_token")
        self.unknown_id = vocabulary.get(unknown) if unknown else model.get("unk_id")
        self._bytes = (
            {token for name, token in vocabulary.items() if _BYTE.fullmatch(name)}
            if model.get("byte_fallback")
            else set()
        )
        refuse_if_unencodable(self)

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

    def is_byte(self, token: int) -> bool:
        """See :class:`Tokenizer`."""
        return token in self._bytes


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` (Llama's kind)."""

    file_name = "tokenizer.model"

    def __init__(self, content: bytes, clues: Clues = NO_CLUES) -> None:
        import sentencepiece

        super().__init__(content, clues.config)
        self._backend = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = self._backend.get_piece_size()
        self.unknown_id = self._backend.unk_id()
        own = self._backend.eos_id()
        self.end_of_text = clues.end_of_text(
            lambda name: self._backend.piece_to_id(name) != self.unknown_id,
            lambda token: self._backend.id_to_piece(token) if token < self.vocab_size else None,
            own=self._backend.id_to_piece(own) if own >= 0 else None,
        )
        self.eos_id = self._backend.piece_to_id(self.end_of_text.token)

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

    def is_byte(self, token: int) -> bool:
        """See :class:`Tokenizer`."""
        return token < self.vocab_size and self._backend.is_byte(token)


def load_tokenizer(path: str | Path, eod_token: str | None = None) -> Tokenizer:
    """Load a tokenizer.

    Args:
        path: a ``tokenizers`` JSON file, a SentencePiece ``.model`` file, a directory that holds
            ``tokenizer.json`` or ``tokenizer.model`` (a prepared, run or checkpoint directory),
            or, when a network is there, a Hugging Face model id such as EleutherAI/gpt-neox-20b.
        eod_token: the token that ends a document; None looks for it where published tokenizers
            name it (:meth:`~ultramem_ds.data.tokenizer_files.Clues.end_of_text`).

    Raises:
        ValueError: if it is none of these, or cannot encode text; the message says which was tried.
    """
    file = find_file(path, (HuggingFaceTokenizer.file_name, SentencePieceTokenizer.file_name))
    content = without_bom(file.read_bytes())
    refuse_other_kinds(content, file)
    kind = HuggingFaceTokenizer if content.lstrip()[:1] == b"{" else SentencePieceTokenizer
    try:
        return kind(content, clues_beside(file, eod_token))
    except Exception as error:  # both libraries raise bare Exception or RuntimeError on bad files
        raise ValueError(f"{file} is not a usable tokenizer: {error}") from error


def replace_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Save into a directory of ours, where files of an earlier tokenizer would come first."""
    path = tokenizer.save(directory)
    for kind in (HuggingFaceTokenizer, SentencePieceTokenizer):
        if kind.file_name != path.name:
            (directory / kind.file_name).unlink(missing_ok=True)
    if tokenizer.config is None and not tokenizer.end_of_text.source:
        (directory / CONFIG_NAME).unlink(missing_ok=True)


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the tokenizer's file, byte for byte, to ``path``."""
    with atomic_file(path) as out:
        out.write(tokenizer.content)
