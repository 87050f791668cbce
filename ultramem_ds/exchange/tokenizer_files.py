"""A run's tokenizer as files from which ``AutoTokenizer`` makes the same one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ultramem_ds.data.tokenizers import HuggingFaceTokenizer, Tokenizer
from ultramem_ds.utils.files import atomic_file, write_json

CONFIG = "tokenizer_config.json"
# Where tokenizers made of one SentencePiece model part: spaces, characters without an entry, names
# of special tokens.
_PROBES = ("the memory of rows", "  two  spaces \n new", "</s> spelt", "café 東京", "end  ")


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> list[str]:
    """Write the tokenizer's file and ``tokenizer_config.json``; returns their names.

    The file is the run's, byte for byte, unless it would add tokens, cut or pad texts by itself:
    then these settings are taken out. A SentencePiece model of which transformers makes another
    tokenizer than SentencePiece gets no ``tokenizer_config.json``, and stderr says so: no tokenizer
    is better than one with other ids.

    Args:
        tokenizer: of the run.
        directory: the exported directory.
        max_length: tokens per training sequence.
    """
    content = tokenizer.content
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content = _plain(content)
    with atomic_file(directory / tokenizer.file_name) as file:
        file.write(content)
    end = tokenizer.decode([tokenizer.eos_id], skip_special=False)
    values: dict[str, Any] = {
        "eos_token": end,
        "bos_token": end,
        "pad_token": end,
        "model_max_length": max_length,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # text that spells a special token stays text
    }
    if isinstance(tokenizer, HuggingFaceTokenizer):
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        values |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        values |= {"add_bos_token": False, "add_eos_token": False}
    write_json(directory / CONFIG, values)
    if not isinstance(tokenizer, HuggingFaceTokenizer) and not _agrees(tokenizer, directory):
        (directory / CONFIG).unlink()
        print(
            f"WARNING: AutoTokenizer would give other ids than {tokenizer.file_name} in training: "
            f"{CONFIG} is left out; encode with the sentencepiece library",
            file=sys.stderr,
        )
        return [tokenizer.file_name]
    return [tokenizer.file_name, CONFIG]


def _agrees(tokenizer: Tokenizer, directory: Path) -> bool:
    """Whether ``AutoTokenizer`` is there and makes the same tokenizer of what was written."""
    try:
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(directory)
    except (ImportError, ValueError, OSError):
        return False
    return all(theirs(text)["input_ids"] == tokenizer.encode(text) for text in _PROBES)


def _plain(content: bytes) -> bytes:
    """A ``tokenizer.json`` that only tokenizes."""
    description = json.loads(content)
    changed = False
    for setting in ("truncation", "padding"):
        changed |= description.get(setting) is not None
        description[setting] = None
    backend = Backend.from_str(content.decode())
    if backend.num_special_tokens_to_add(False):
        changed = True
        description["post_processor"] = None
    if not changed:
        return content
    return json.dumps(description, ensure_ascii=False).encode()
