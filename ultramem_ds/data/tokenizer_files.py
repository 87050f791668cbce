"""A tokenizer's files: which one to read, what it is, and which token ends a text."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultramem_ds.utils.files import read_json

CONFIG_NAME = "tokenizer_config.json"
# Beside a tokenizer, in order of precedence; each may name the end-of-text token.
_TOKEN_FILES = (CONFIG_NAME, "special_tokens_map.json")
_GENERATION_NAME = "generation_config.json"
CLUES = (*_TOKEN_FILES, _GENERATION_NAME)
# Names of the end-of-text token in published tokenizers, the first present one is taken.
_KNOWN_NAMES = (
    "<|endoftext|>",
    "</s>",
    "<eos>",
    "<|end_of_text|>",
    "<|eos|>",
    "[EOS]",
    "<|eod|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class EndOfText:
    """The token that ends a text.

    Attributes:
        token: of the vocabulary.
        source: what says so; empty for the tokenizer itself, by a name that is known.
        rivals: other tokens that were as likely.
    """

    token: str
    source: str = ""
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clues:
    """What lies beside a tokenizer's file and on the command line about its end of text.

    Attributes:
        chosen: by the user.
        tokens: (file, token) of configuration files.
        ids: (file, id), likewise.
        config: bytes of ``tokenizer_config.json``; None without one.
    """

    chosen: str | None = None
    tokens: tuple[tuple[str, str], ...] = ()
    ids: tuple[tuple[str, int], ...] = ()
    config: bytes | None = None

    def end_of_text(
        self,
        has: Callable[[str], bool],
        token_of: Callable[[int], str | None],
        own: str | None = None,
    ) -> EndOfText:
        """The token that ends a text.

        In order: the user's choice, ``tokenizer_config.json``, ``special_tokens_map.json``,
        ``generation_config.json``, the tokenizer's ``own`` (SentencePiece), names that published
        tokenizers use.

        Raises:
            ValueError: if what is named is not there, or nothing is found.
        """
        if self.chosen is not None:
            if not has(self.chosen):
                raise ValueError(f"it has no token {self.chosen!r} (--eod-token)")
            return EndOfText(self.chosen, "--eod-token")
        for file, token in self.tokens:
            if not has(token):
                raise ValueError(f"{file} names {token!r} as its end of text, which it has not")
            return EndOfText(token, file)
        for file, number in self.ids:
            found = token_of(number)
            if found is None:
                raise ValueError(f"{file} names id {number} as its end of text, which it has not")
            return EndOfText(found, file)
        names = [own] if own is not None else [name for name in _KNOWN_NAMES if has(name)]
        if not names:
            raise ValueError(
                f"it has no end-of-text token, none of {', '.join(_KNOWN_NAMES)}; name one of its "
                "tokens with --eod-token"
            )
        return EndOfText(names[0], rivals=tuple(names[1:]))


NO_CLUES = Clues()


def clues_beside(file: Path, chosen: str | None) -> Clues:
    """What the files in a tokenizer's directory say; those of a file of another name are not its.

    Raises:
        ValueError: if one of them is not JSON.
    """
    directory = file.parent
    own = file.name in ("tokenizer.json", "tokenizer.model")
    tokens, ids = [], []
    for name in _TOKEN_FILES if own else ():
        token = _object(directory / name).get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens.append((name, token))
    if own:
        number = _object(directory / _GENERATION_NAME).get("eos_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int):
            ids.append((_GENERATION_NAME, number))
    config = directory / CONFIG_NAME
    content = config.read_bytes() if own and config.is_file() else None
    return Clues(chosen, tuple(tokens), tuple(ids), content)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file."""
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object")
    return value


def config_naming(config: bytes | None, token: str, *, keep: bool) -> bytes | None:
    """``tokenizer_config.json`` that names ``token`` as the end of text, changed only if need be.

    Args:
        config: what there is.
        token: to be named.
        keep: the token is found without it, so that none need be written.
    """
    value = json.loads(config.decode("utf-8-sig")) if config is not None else {}
    named = value.get("eos_token")
    if keep or (named.get("content") if isinstance(named, dict) else named) == token:
        return config
    return (json.dumps({**value, "eos_token": token}, indent=2) + "\n").encode()


def find_file(path: str | Path, names: Sequence[str]) -> Path:
    """The tokenizer's file at ``path``: itself, the first of ``names`` in it, or from the hub.

    Raises:
        ValueError: if there is none.
    """
    file = Path(path)
    if file.is_dir():
        present = [file / name for name in names if (file / name).is_file()]
        if present:
            return present[0]
        if (file / "vocab.json").is_file() and (file / "merges.txt").is_file():
            # Without a configuration that names the model, AutoTokenizer does not know its class.
            kind = "AutoTokenizer" if (file / "config.json").is_file() else "GPT2TokenizerFast"
            raise ValueError(
                f"{file} holds vocab.json and merges.txt but no tokenizer.json; transformers' "
                f"{kind}.from_pretrained(DIR).save_pretrained(DIR) writes one"
            )
        raise ValueError(
            f"{file} holds neither {' nor '.join(names)}; "
            "repeat `prepare`, or copy the tokenizer there"
        )
    if file.is_file():
        return file
    if isinstance(path, str) and path.count("/") == 1 and not path.startswith(("/", ".")):
        return _download(path, names[0])
    raise ValueError(f"tokenizer file {path} does not exist")


def _download(model_id: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        file = Path(hf_hub_download(model_id, name))
        for beside in CLUES:
            try:
                hf_hub_download(model_id, beside)
            except EntryNotFoundError:
                continue
    except Exception as error:  # offline, unknown id, no such file: many exception types
        raise ValueError(
            f"{model_id} is no local file, and as a Hugging Face id it failed: {error}"
        ) from error
    return file


def without_bom(content: bytes) -> bytes:
    """The content without a UTF-8 byte-order mark, which the libraries take for garbage."""
    return content.removeprefix(codecs.BOM_UTF8)


def refuse_other_kinds(content: bytes, file: Path) -> None:
    """Name what people give for a tokenizer and is none, or none of a kind that is read.

    Raises:
        ValueError: saying what the file is and what to give.
    """
    what = _other_kind(content, file)
    if what is not None:
        raise ValueError(f"{file} is {what}")


def _other_kind(content: bytes, file: Path) -> str | None:
    if not content.strip():
        return "not a usable tokenizer: it is empty"
    if content.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the tokenizer; `git lfs pull` fetches it"
    if content.lstrip()[:5].lower() in (b"<html", b"<!doc"):
        return "an HTML page, not a tokenizer"
    if content.startswith(_UTF16):
        return "UTF-16 by its byte-order mark; save it as UTF-8"
    if content.startswith(b"\x1f\x8b"):
        return "compressed by gzip; decompress it"
    if _TIKTOKEN.match(content):
        return (
            "a tiktoken vocabulary, which has no rules of its own to cut text; give the model's "
            "tokenizer.json (transformers.convert_slow_tokenizer.TikTokenConverter makes one)"
        )
    if content[:1] != b"{":
        return None
    try:
        keys = json.loads(content).keys()
    except ValueError:
        return None  # torn: the library says where
    if "model" in keys:
        return None
    if {"config", "vocab"} <= keys:
        return "Mistral's tekken format; give the model's tokenizer.json"
    if "tokenizer_class" in keys or "eos_token" in keys:
        return f"a configuration; give the tokenizer itself, {file.parent / 'tokenizer.json'}"
    if all(isinstance(value, int) for value in list(json.loads(content).values())[:16]):
        return "a bare vocabulary; give a tokenizer.json, which has the rules too"
    return None
