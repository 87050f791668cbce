"""What messages advise, taken out of them and followed: how the cases of test_advice_*.py work.

A case claims the words of one message of the package (:func:`says`). When its mistake is made, the
printed message must have those words; what stands in their gaps is what the advice names, and goes
into the command that follows it. ``test_advice_is_followed.py`` walks the package's messages and
finds advice that no case claims.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.bad_exports import EXPORTS
from tests.unit.bad_input_files import REST
from tests.unit.bad_input_texts import TEXTS
from tests.unit.bad_input_tokens import TOKENS
from tests.unit.bad_inputs import CONFIGURATION, DEEPSPEED, Command, Scene
from tests.unit.bad_tasks import TASKS
from ultramem_ds.cli.main import main

MISTAKES = {
    case.what: case.command
    for case in (*CONFIGURATION, *DEEPSPEED, *REST, *TEXTS, *TOKENS, *EXPORTS, *TASKS)
}


@dataclass(frozen=True)
class Claim:
    """Words of a message, as its source has them; ``{}`` is a gap.

    Attributes:
        words: a part of one message of the package.
        where: its module, where several say the same.
        whole: the message says nothing else.
    """

    words: str
    where: str = ""
    whole: bool = False

    def span(self, text: str, module: str) -> tuple[int, int] | None:
        """Where the words stand in a message's text, if they do."""
        if self.where not in ("", module) or (self.whole and text != self.words):
            return None
        at = text.find(self.words)
        return (at, at + len(self.words)) if at >= 0 else None

    def values(self, message: object) -> tuple[str, ...]:
        """What stands in the gaps of a printed message, unquoted; fails if it says otherwise."""
        *inner, last = (re.escape(part) for part in self.words.split("{}"))
        pattern = "(.*?)".join([*inner, last]) if last or not inner else "(.*?)".join(inner)
        pattern += "" if last or not inner else r"(.*?)(?:\n|$)"
        found = re.search(pattern, str(message))
        assert found is not None, f"{self.words!r} is not in: {message}"
        return tuple(value.strip("'\"") for value in found.groups())


CLAIMS: list[Claim] = []


def says(words: str, where: str = "", *, whole: bool = False) -> Claim:
    """Claim a message's advice: the case that holds it follows it."""
    claim = Claim(words, where, whole)
    CLAIMS.append(claim)
    return claim


@dataclass
class Told:
    """A refused command.

    Attributes:
        scene: where it ran.
        argv: the command.
        values: what the message names, see :class:`Claim`.
        line: the whole message.
    """

    scene: Scene
    argv: list[str]
    values: tuple[str, ...]
    line: str

    def without(self, *words: str) -> list[str]:
        """The command without words that are the mistake."""
        return [word for word in self.argv if word not in words]

    def option(self, name: str, value: str | Path) -> list[str]:
        """The command with another value of an option, or with the option."""
        argv = list(self.argv)
        if name not in argv:
            return [*argv, name, str(value)]
        argv[argv.index(name) + 1] = str(value)
        return argv


Follow = Callable[[Told], list[str]]


@dataclass(frozen=True)
class Advice:
    """A command that is refused, and the same after its advice was followed.

    Attributes:
        mistake: of ``docs/bad-input.md`` by its words, or a command of its own.
        claim: what the message says.
        follow: does as it says and gives the command again.
    """

    mistake: str | Command
    claim: Claim
    follow: Follow
    name: str = ""

    @property
    def title(self) -> str:
        """For pytest."""
        what = self.mistake if isinstance(self.mistake, str) else self.name
        return f"{what}: {self.claim.words[:50]}"


class Built(Exception):
    """A command got past everything that refuses it: here its model would be built."""


@dataclass(frozen=True)
class Said:
    """How a command ended: its exit code, 0 too where it got as far as a model, and its text."""

    code: int
    text: str

    @property
    def line(self) -> str:
        """What the one line of an error says."""
        lines = [line for line in self.text.splitlines() if "error: " in line]
        assert self.code == 2 and len(lines) == 1, self.text
        return lines[0].partition("error: ")[2]


def ask(argv: list[str], **environment: str) -> Said:
    """Run a command in this process, as ``python -m ultramem_ds`` would."""
    before = dict(os.environ)
    output = io.StringIO()
    os.environ.update(environment)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = main(argv)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    except Built:
        code = 0
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Said(code, output.getvalue())


@contextlib.contextmanager
def no_training() -> Iterator[None]:
    """``train`` ends where it would begin: a run that has been checked."""

    def built(*args: object, **kwargs: object) -> None:
        raise Built

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultramem_ds.train.loop.train", built)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        yield


def follow(case: Advice, scene: Scene) -> Said:
    """Make the mistake, read the message, do as it says."""
    command = MISTAKES[case.mistake] if isinstance(case.mistake, str) else case.mistake
    argv = command(scene)
    with no_training():
        refused = ask(argv, **scene.environment)
        told = Told(scene, argv, case.claim.values(refused.line), refused.line)
        again = case.follow(told)
        return ask(again, **scene.environment)


def with_words(*words: str) -> Follow:
    """The command with words added; ``{0}`` is what the message's first gap names."""
    return lambda told: [*told.argv, *(word.format(*told.values) for word in words)]


def instead(old: str, new: str = "{0}") -> Follow:
    """The command with a piece of its text replaced by what the message names."""
    return lambda told: [word.replace(old, new.format(*told.values)) for word in told.argv]
