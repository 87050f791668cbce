"""The subset that a file or record belongs to: RedPajama's names in every spelling, or a path's."""

from __future__ import annotations

import re
from pathlib import PurePath

from ultramem_ds.data.formats import stem_of

# Share of each subset in the default mixture: RedPajama-1T by tokens, without books.
REDPAJAMA_WEIGHTS = {
    "common_crawl": 0.742,
    "c4": 0.148,
    "github": 0.050,
    "arxiv": 0.024,
    "wikipedia": 0.020,
    "stackexchange": 0.017,
}
# Held-out corpora: every document of such a subset goes to the validation split.
HELD_OUT = ("c4_validation",)

_SUBSETS = (*REDPAJAMA_WEIGHTS, "book")
# Other spellings: SlimPajama's record field, and names of the 1T-Sample's files.
_ALIASES = {f"redpajama{name.replace('_', '')}": name for name in _SUBSETS} | {
    "cc": "common_crawl",
    "commoncrawl": "common_crawl",
    "books": "book",
}
_C4_VALIDATION = re.compile(r"^c4-validation\.\d+-of-\d+\.json")
_V2_DOCUMENTS = re.compile(r"^[a-z]{2}_(head|middle|tail)\.json")  # RedPajama-V2
# Names whose sidecar would overwrite a file of the prepared directory.
_RESERVED = ("manifest", "tokenizer")


def canonical_subset(name: str) -> str | None:
    """RedPajama's name of a subset under any of its spellings, or None."""
    lowered = name.lower()
    return lowered if lowered in _SUBSETS else _ALIASES.get(lowered.replace("_", ""))


def subset_of_file(relative: PurePath, fallback: str) -> str:
    """Subset of a file from its path.

    RedPajama-1T's directories, 1T-Sample's file names (``cc_2019-30_sample.jsonl``),
    RedPajama-V2's and C4 validation's names are recognised; any other file belongs to the first
    directory below the input it was found in, or else to ``fallback``.

    Args:
        relative: path below the input, with the input's own name in front.
        fallback: name for files that lie directly in the input.
    """
    name = relative.name
    if _C4_VALIDATION.match(name):
        return HELD_OUT[0]
    for part in reversed(relative.parts[:-1]):
        if known := canonical_subset(part):
            return known
    stem = stem_of(name)
    if stem.endswith("_sample") and (known := canonical_subset(stem.split("_")[0])):
        return known
    if known := canonical_subset(stem):
        return known
    if _V2_DOCUMENTS.match(name):
        return "common_crawl"
    return safe_name(relative.parts[1] if len(relative.parts) > 2 else fallback)


def safe_name(name: str) -> str:
    """A subset name that is also a file name."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip(".") or "data"
    return f"{safe}_data" if safe in _RESERVED else safe
