"""A corpus of real text made from the packages of Debian and PyPI (docs/corpus.md)."""
