"""Prompts and answers: records whose loss counts on the answers alone.

A *completion* record has a prompt and an answer, which are joined as they are. A *chat* record is
a list of messages; each is written as a line ``<|role|>``, its content and a line break, and what
an assistant says ends in the end-of-text id, which belongs to the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

_PROMPT_KEYS = ("prompt", "question", "instruction")
_ANSWER_KEYS = ("completion", "answer", "response", "output")
_MESSAGE_KEYS = ("messages", "conversations", "conversation")
_ASSISTANTS = ("assistant", "gpt", "model", "bot")


@dataclass(frozen=True)
class Segment:
    """A part of a document.

    Attributes:
        text: of the part.
        answer: whether its tokens count in the loss.
        ends: whether the end-of-text id follows, and counts.
    """

    text: str
    answer: bool = True
    ends: bool = False


def segments_of(row: Mapping[str, Any], form: str) -> tuple[Segment, ...] | str:
    """The segments of a record of format ``completion`` or ``chat``, or why it has none."""
    return _completion(row) if form == "completion" else _chat(row)


def _completion(row: Mapping[str, Any]) -> tuple[Segment, ...] | str:
    prompt = next((key for key in _PROMPT_KEYS if isinstance(row.get(key), str)), None)
    answer = next((key for key in _ANSWER_KEYS if isinstance(row.get(key), str)), None)
    if prompt is None:
        return f"no {' / '.join(_PROMPT_KEYS)}"
    if answer is None:
        return f"no {' / '.join(_ANSWER_KEYS)}"
    if not row[answer]:
        return f"{answer} is empty"
    text = row[prompt]
    more = row.get("input")
    if prompt == "instruction" and isinstance(more, str) and more:  # Alpaca's third column
        text = f"{text}\n\n{more}"
    return Segment(text, answer=False), Segment(row[answer], ends=True)


def _chat(row: Mapping[str, Any]) -> tuple[Segment, ...] | str:
    key = next((key for key in _MESSAGE_KEYS if isinstance(row.get(key), list)), None)
    if key is None:
        return f"no list of {' / '.join(_MESSAGE_KEYS)}"
    segments: list[Segment] = []
    for message in row[key]:
        if not isinstance(message, dict):
            return "a message is no object"
        role, content = _role(message), _content(message)
        if role is None:
            return "a message has no role"
        if content is None:
            return "a message has no text as its content"
        segments.append(Segment(f"<|{role}|>\n", answer=False))
        # OpenAI's format lets a message of weight 0 be context only.
        if role == "assistant" and message.get("weight", 1):
            segments += [Segment(content, ends=True), Segment("\n", answer=False)]
        else:
            segments.append(Segment(f"{content}\n", answer=False))
    if not any(segment.answer for segment in segments):
        return "no message of an assistant"
    if segments[-2].ends:  # nothing follows its end-of-text id
        segments.pop()
    return tuple(segments)


def _role(message: Mapping[str, Any]) -> str | None:
    role = message.get("role", message.get("from"))
    if not isinstance(role, str) or not role:
        return None
    lowered = role.lower()
    return "assistant" if lowered in _ASSISTANTS else {"human": "user"}.get(lowered, lowered)


def _content(message: Mapping[str, Any]) -> str | None:
    """The text of a message; None if it is something else, or has parts that are."""
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        return "".join(texts) if len(texts) == len(parts) else None
    return content if isinstance(content, str) else None


class Encoder(Protocol):
    """What encoding segments needs of a tokenizer."""

    eos_id: int

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        ...


def encode_answers(
    tokenizer: Encoder, documents: Sequence[Sequence[Segment]], dtype: npt.DTypeLike
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """Encode documents segment by segment, as ``generate`` encodes a prompt by itself.

    A tokenizer that puts a space before every text would put one into a document's middle: such a
    segment is encoded after a line break, whose ids are taken off again.

    Returns:
        The ids of all documents, each ending in the end-of-text id, concatenated, of ``dtype``;
        tokens per document, int32; and for every id 1 if it counts as a target, else 0.
    """
    anchor = tokenizer.encode_batch(["\n"])[0]
    texts = [
        segment.text if first else f"\n{segment.text}"
        for document in documents
        for first, segment in zip(_first(document), document)
    ]
    alone = tokenizer.encode_batch([s.text for document in documents for s in document])
    encoded = iter(zip(tokenizer.encode_batch(texts), alone))
    ids: list[int] = []
    mask: list[int] = []
    lengths = []
    for document in documents:
        begin = len(ids)
        for first, segment in zip(_first(document), document):
            anchored, own = next(encoded)
            clean = not first and anchored[: len(anchor)] == anchor
            part = anchored[len(anchor) :] if clean else own
            ids += part
            mask += [int(segment.answer)] * len(part)
            if segment.ends:
                ids.append(tokenizer.eos_id)
                mask.append(1)
        if not document[-1].ends:
            ids.append(tokenizer.eos_id)
            mask.append(0)
        mask[begin] = 0  # nothing of its own document predicts a first token
        lengths.append(len(ids) - begin)
    return np.array(ids, dtype), np.array(lengths, np.int32), np.array(mask, np.uint8)


def _first(document: Sequence[Segment]) -> list[bool]:
    """Whether each segment is the first one with text."""
    with_text = next((i for i, segment in enumerate(document) if segment.text), 0)
    return [index <= with_text for index in range(len(document))]
