"""Near-duplicates among documents: MinHash signatures in a locality-sensitive index."""

from __future__ import annotations

import re
import zlib

NUM_PERMUTATIONS = 64
SIMILARITY = 0.8  # Jaccard index of the shingles from which two documents are the same
SHINGLE_WORDS = 5
MAX_SHINGLES = 4000  # of a document, evenly taken; enough to tell documents apart
_WORDS = re.compile(r"\w+")


class NearDuplicates:
    """Tells whether a document is nearly one that came before.

    Documents of fewer than ``SHINGLE_WORDS`` words are never duplicates.
    """

    def __init__(self) -> None:
        from datasketch import MinHash, MinHashLSH

        self._make = MinHash
        self._index = MinHashLSH(threshold=SIMILARITY, num_perm=NUM_PERMUTATIONS)
        self.documents = 0

    def seen(self, text: str) -> bool:
        """Whether a document before was nearly this one; if not, remember it."""
        shingles = _shingles(text)
        if not shingles:
            return False
        signature = self._make(num_perm=NUM_PERMUTATIONS, hashfunc=_identity)
        signature.update_batch(shingles)
        if self._index.query(signature):
            return True
        self._index.insert(self.documents, signature)
        self.documents += 1
        return False


def _identity(value: int) -> int:
    return value


def _shingles(text: str) -> list[int]:
    """32-bit hashes of runs of words."""
    words = _WORDS.findall(text.lower())
    hashes = {
        zlib.crc32(" ".join(words[i : i + SHINGLE_WORDS]).encode())
        for i in range(len(words) - SHINGLE_WORDS + 1)
    }
    if len(hashes) <= MAX_SHINGLES:
        return list(hashes)
    return sorted(hashes)[:MAX_SHINGLES]  # the smallest hashes: the same choice in every document
