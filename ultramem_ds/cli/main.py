"""Command line: one verb, one thin file beside this one."""

from __future__ import annotations

import argparse
import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

from ultramem_ds import __version__
from ultramem_ds.utils import environment

# verb -> module of ultramem_ds.cli; imported only when needed, so that --help stays quick.
VERBS = {
    "prepare": "prepare",
    "train-tokenizer": "train_tokenizer",
    "inspect-data": "inspect_data",
    "train": "train",
    "evaluate": "evaluate",
    "generate": "generate",
    "export": "export",
    "import": "import_",
    "count": "count",
    "plan": "plan",
    "bench": "bench",
    "report": "report",
    "study": "study",
    "doctor": "doctor",
}

_AFTER_RANK_0_S = 5.0  # launchers look at their processes about once a second


class AnyOrderParser(argparse.ArgumentParser):
    """Options and positional arguments (overrides) in any order, for every verb.

    argparse by itself takes only the first run of positional arguments.
    """

    _intermixed = False  # argparse parses twice for it, through the method below

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As usual; positional arguments need not stand together."""
        if self._intermixed or any(a.nargs == argparse.PARSER for a in self._actions):
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._intermixed = False


def build_parser(verbs: Sequence[str] = tuple(VERBS)) -> argparse.ArgumentParser:
    """The parser with the given verbs."""
    parser = AnyOrderParser(
        prog="ultramem-ds",
        description="Pre-train UltraMem language models (arXiv 2411.12364) with DeepSpeed.",
        epilog="For many ranks: deepspeed --no_local_rank --module ultramem_ds VERB ..., or "
        "torchrun -m ultramem_ds VERB ...",
    )
    parser.add_argument("--version", action="version", version=f"ultramem-ds {__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb in verbs:
        importlib.import_module(f"ultramem_ds.cli.{VERBS[verb]}").add_parser(subparsers)
    return parser


def _say(error: Exception) -> None:
    """The error's line, once for all ranks.

    Rank 0 speaks at once. The launcher ends the other ranks a moment after the first has failed:
    one that lives beyond that has met what rank 0 has not.
    """
    rank = environment.rank_told()
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # training would save and go on at it
        time.sleep(_AFTER_RANK_0_S)
    whose = f"error on rank {rank}" if rank else "error"
    print(f"{whose}: {error}", file=sys.stderr, flush=True)


def _nobody_reads() -> bool:
    """Whether it is stdout's pipe that broke, and not one between this program's processes."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; a ``ValueError`` or ``OSError`` becomes one line and exit code 2.

    Where the reader of a pipe has left (``| head``) there is nobody to tell.
    """
    # Read by torch at its first allocation: tensors of 2 MiB and more take huge pages, so that a
    # step's large temporaries cost a page fault for every 2 MiB instead of for every 4 KiB.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    argv = list(sys.argv[1:] if argv is None else argv)
    verb = argv[0] if argv else ""
    try:
        arguments = build_parser([verb] if verb in VERBS else tuple(VERBS)).parse_args(argv)
        code = int(arguments.run(arguments))
        sys.stdout.flush()
        return code
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        if os.environ.get("ULTRAMEM_TRACEBACK"):
            raise
        _say(error)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
