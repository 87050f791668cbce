"""A console that shows this program's lines; what libraries print goes to a file.

DeepSpeed, PyTorch and Gloo print from Python and from C++, in ranks and in the processes of
launchers. A rank points its file descriptors 1 and 2 at a file and keeps the console for ``print``;
a launcher, whose ranks' lines pass through it, sorts lines by their looks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import select
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

LOGS = "logs"  # inside a run directory

# With the host that pdsh puts before a line.
_LIBRARY_LINE = re.compile(
    rb"(?:[\w.-]+: )?"
    rb"(?:\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\] \[[A-Z]+\] "  # DeepSpeed
    rb"|(?:\[rank\d+\]:)?\[?[IWEF]\d{4} \d\d:\d\d:\d\d"  # PyTorch
    rb"|\[Gloo\] )"
)


def is_library_line(line: bytes) -> bool:
    """Whether a line is in the format of a library's log."""
    return _LIBRARY_LINE.match(line) is not None


def _show(descriptor: int, data: bytes) -> None:
    """Write all of it; a descriptor that is full for now is waited for, one that is gone is not."""
    left = memoryview(data)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:  # a pipe that whoever reads it has made non-blocking
            select.select([], [descriptor], [])
        except OSError:  # nobody looks any more
            return


class _Console(io.RawIOBase):
    """A descriptor that may lead nowhere one day: a run outlives the launcher that showed it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def fileno(self) -> int:
        return self._descriptor

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        _show(self._descriptor, bytes(data))
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            os.close(self._descriptor)


class LibraryOutput:
    """Descriptors 1 and 2 of this process while they do not lead to the console."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - close() is below
        self._console = [os.dup(descriptor) for descriptor in (1, 2)]
        self._streams: list[TextIO | None] = []
        self.kept: Path | None = None
        self._point_at(self._file.fileno())

    @staticmethod
    def _point_at(descriptor: int) -> None:
        _flush()
        for own in (1, 2):
            os.dup2(descriptor, own)

    def speak(self) -> None:
        """From here on ``print`` reaches the console; libraries imported before do not."""
        if sys.stdout is not sys.__stdout__ or sys.stderr is not sys.__stderr__:
            return  # somebody else has taken them
        self._streams = [sys.stdout, sys.stderr]
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(
                io.BufferedWriter(_Console(os.dup(descriptor))),
                encoding="utf-8",
                errors="replace",
                line_buffering=True,
            )
            for descriptor in self._console
        )

    def keep(self, path: Path) -> None:
        """Move what there is, and what comes, to the end of the file ``path``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _flush()
        file = open(path, "ab")  # noqa: SIM115 - close() is below
        self._file.seek(0)
        file.write(self._file.read())
        file.flush()
        self._point_at(file.fileno())
        self._file.close()
        self._file, self.kept = file, path

    def text(self) -> str:
        """What has come and is not kept."""
        _flush()
        self._file.seek(0)
        return self._file.read().decode(errors="replace")

    def close(self) -> None:
        """Give the console back."""
        if self._streams:
            for ours, theirs in zip((sys.stdout, sys.stderr), self._streams):
                if ours is not theirs:
                    ours.close()
            sys.stdout, sys.stderr = self._streams
        with contextlib.suppress(OSError):  # no room for libraries' lines: ours must be seen
            _flush()
        for own, descriptor in zip((1, 2), self._console):
            os.dup2(descriptor, own)
            os.close(descriptor)
        with contextlib.suppress(OSError):
            self._file.close()


@contextlib.contextmanager
def libraries_apart(verbose: bool = False) -> Iterator[LibraryOutput | None]:
    """Keep what libraries print off the console; import them before :meth:`LibraryOutput.speak`.

    If the block fails without a word of this program's own, what they printed is shown after all.

    Args:
        verbose: leave everything as it is, and yield None.
    """
    if verbose:
        yield None
        return
    output = LibraryOutput()
    logging.captureWarnings(True)
    warnings_log = logging.getLogger("py.warnings")
    handler = logging.StreamHandler(sys.__stderr__)
    warnings_log.addHandler(handler)
    shown = ""
    try:
        yield output
    except (ValueError, OSError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        shown = output.text() if output.kept is None else f"libraries: see {output.kept}\n"
        raise
    finally:
        warnings_log.removeHandler(handler)
        logging.captureWarnings(False)
        output.close()
        if shown:
            print(shown, file=sys.stderr, end="", flush=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if stream is not None:
            stream.flush()


class Sorter:
    """Passes a process's lines on to the console, but for libraries', which it keeps.

    Args:
        source: the process's output.
        console: a descriptor.
        kept: where libraries' lines are added.

    Attributes:
        shown: lines that were passed on.
    """

    def __init__(self, source: IO[bytes], console: int, kept: list[bytes]) -> None:
        self._source = source
        self._console = console
        self._kept = kept
        self.shown = 0  # lines
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for line in iter(self._source.readline, b""):
            if is_library_line(line):
                self._kept.append(line)
            else:
                self.shown += 1
                _show(self._console, line)

    def finish(self, timeout_s: float) -> None:
        """Wait for the end of the output."""
        self._thread.join(timeout_s)
