"""Training small tokenizers, for experiments and tests."""

from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from ultramem_ds.data.options import ReadOptions
from ultramem_ds.data.readers import BadRecord, Document, read_unit
from ultramem_ds.data.sources import summary, survey
from ultramem_ds.data.tokenizers import (
    END_OF_TEXT,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    save_tokenizer,
)

logger = logging.getLogger(__name__)

TokenizerKind: TypeAlias = Literal["bpe", "sentencepiece"]


def train_on_inputs(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    kind: TokenizerKind = "bpe",
    vocab_size: int = 8192,
    max_bytes: int = 256 << 20,
    reading: ReadOptions | None = None,
) -> tuple[Path, Tokenizer]:
    """Train on files and write the tokenizer.

    Args:
        inputs: as for ``prepare``.
        output: the file, or a directory, which gets ``tokenizer.json`` or ``tokenizer.model``.
        kind: see :func:`train_tokenizer`.
        vocab_size: entries.
        max_bytes: of text to read, an equal share from the beginning of every unit.
        reading: how inputs become documents.

    Returns:
        The file written, and the tokenizer.

    Raises:
        ValueError: for inputs without text or an impossible vocabulary.
    """
    path = Path(output)
    own = {path.resolve(): "the tokenizer to write"}
    texts = _sample_texts([str(i) for i in inputs], max_bytes, reading or ReadOptions(), own)
    tokenizer = train_tokenizer(texts, kind=kind, vocab_size=vocab_size)
    if path.is_dir():
        return tokenizer.save(path), tokenizer
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, path)
    return path, tokenizer


def _sample_texts(
    inputs: Sequence[str], max_bytes: int, reading: ReadOptions, own: Mapping[Path, str]
) -> Iterator[str]:
    found = survey(inputs, reading, own)
    skipped = [entry for entry in found.skipped if not entry.expected]
    if skipped:
        logger.warning("not read: %s", summary(skipped))
    share = max_bytes / max(1, len(found.units))
    documents = 0
    bad: Counter[str] = Counter()
    for unit in found.units:
        taken = 0
        for record in read_unit(unit, reading):
            if isinstance(record, BadRecord):
                bad[record.reason] += 1
            elif isinstance(record, Document):
                documents += 1
                yield record.text
                taken += len(record.data)
            if taken >= share:
                break
    reasons = ", ".join(f"{count} x {reason}" for reason, count in bad.most_common(3))
    if not documents:
        raise ValueError(
            f"the inputs hold no document to train on ({reasons or 'no record at all'}); see "
            "--text-key and --format"
        )
    if bad:
        logger.warning("%d of %d records are unusable: %s", bad.total(), documents, reasons)


def train_tokenizer(texts: Iterable[str], *, kind: TokenizerKind, vocab_size: int) -> Tokenizer:
    """Train a small tokenizer.

    ``bpe`` is byte-level BPE with ``<|endoftext|>`` as id 0: any Unicode text comes back from its
    ids. ``sentencepiece`` is BPE with byte fallback and no normalisation: any text comes back but
    for U+2581, SentencePiece's own sign for a space. The vocabulary has at most ``vocab_size``
    entries, fewer on small texts.

    Raises:
        ValueError: if ``vocab_size`` cannot hold the bytes and special tokens.
    """
    if vocab_size < 264:
        raise ValueError(f"vocab_size={vocab_size} is too small: 256 bytes plus special tokens")
    if kind == "bpe":
        return HuggingFaceTokenizer(_train_bpe(texts, vocab_size))
    return SentencePieceTokenizer(_train_sentencepiece(texts, vocab_size))


def _train_bpe(texts: Iterable[str], vocab_size: int) -> bytes:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(iter(texts), trainer)
    content: str = backend.to_str()
    return content.encode()


def _train_sentencepiece(texts: Iterable[str], vocab_size: int) -> bytes:
    import sentencepiece

    # The trainer skips sentences over its limit in bytes, so documents are fed line by line.
    limit = 4192
    lines = (
        line[begin : begin + limit // 4]
        for text in texts
        for line in text.splitlines()
        for begin in range(0, len(line), limit // 4)
    )
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        max_sentence_length=limit,
        byte_fallback=True,
        character_coverage=0.9995,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
    )
    return model.getvalue()
