"""What a user gets wrong costs one clear line, no traceback, no model and no half-written files.

The cases are run as they are and their messages compared with docs/bad-input.md; ``make
bad-input`` writes that file anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.bad_exports import EXPORTS
from tests.unit.bad_input_files import REST
from tests.unit.bad_input_texts import TEXTS
from tests.unit.bad_input_tokens import TOKENS
from tests.unit.bad_inputs import CONFIGURATION, DEEPSPEED, Case, Scene
from tests.unit.bad_tasks import TASKS
from ultramem_ds.cli.main import main

CASES = [*CONFIGURATION, *DEEPSPEED, *REST, *TEXTS, *TOKENS, *EXPORTS, *TASKS]
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "bad-input.md"
UPDATE = "UPDATE_BAD_INPUT"


@dataclass(frozen=True)
class Answer:
    """What a command said: its exit code, its one line of error, and files it should not leave."""

    code: int
    line: str
    left: list[Path]


@pytest.fixture(scope="module")
def answers(
    prepared: Path, trained: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Answer]]:
    """Every case's answer, by what is wrong."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was built")

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultramem_ds.train.loop.TrainEngine", refuse)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.delenv(name, raising=False)
        for number, case in enumerate(CASES):
            root = tmp_path_factory.mktemp(f"case-{number:02d}")
            found[case.what] = answer(case, Scene(root, prepared, trained))
    yield found


def answer(case: Case, scene: Scene) -> Answer:
    """Run a case's command in this process, as ``python -m ultramem_ds`` would."""
    before = dict(os.environ)
    output, errors = io.StringIO(), io.StringIO()
    argv = case.command(scene)
    os.environ.update(scene.environment)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            code = main(argv)
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    except Exception as error:  # what the user would see a traceback of
        return Answer(-1, f"uncaught {error!r}", [])
    finally:
        os.environ.clear()
        os.environ.update(before)
    lines = [line for line in errors.getvalue().splitlines() if "error: " in line]
    line = lines[0] if len(lines) == 1 else f"not one line: {errors.getvalue()!r}"
    for path, name in ((scene.root, ""), (scene.prepared, "DATA"), (scene.trained, "RUN")):
        line = line.replace(f"{path}/", f"{name}/" if name else "").replace(str(path), name or ".")
    left = [path for path in scene.untouched if path.exists()]
    line = re.sub(r"\b[0-9a-f]{12,}\b", "...", line)
    # Where a cut file ends depends on timings and paths that it held.
    line = re.sub(r"\d+ bytes, not the \d+ that", "... bytes, not the ... that", line)
    line = re.sub(r"line \d+ column \d+ \(char \d+\)", "line ... column ... (char ...)", line)
    return Answer(code, line, left)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_one_line_says_what_and_where(case: Case, answers: dict[str, Answer]) -> None:
    said = answers[case.what]
    assert said.code == 2, said.line
    assert not said.left, "files were left behind"
    missing = [name for name in case.names if name not in said.line]
    assert not missing, f"{missing} not in: {said.line}"


def test_the_document_shows_these_messages(answers: dict[str, Answer]) -> None:
    assert len({case.what for case in CASES}) == len(CASES) >= 40
    text = document(answers)
    if os.environ.get(UPDATE):
        DOCUMENT.write_text(text)
    assert DOCUMENT.read_text() == text, "run `make bad-input` and look at the difference"


def document(answers: dict[str, Answer]) -> str:
    """``docs/bad-input.md``."""
    text = f"""# Bad input and what it is answered

{len(CASES)} mistakes, each with the line that the real command prints on stderr, with exit code
2. No model has been built by then, and nothing half-written is left. This file is written by
`make bad-input` and checked by `tests/unit/test_bad_input.py`; `RUN` is a good run directory,
`DATA` good prepared data, other paths are relative. With `ULTRAMEM_TRACEBACK=1` the traceback
appears instead. A run directory with several checkpoints falls back to the newest good one
([checkpoints](checkpoints.md)); the messages here are about the only one. What a message advises is
followed by `tests/unit/test_advice_*.py`, with what it names, until the command goes through.
"""
    area = ""
    for case in CASES:
        if case.area != area:
            area = case.area
            text += f"\n## {area}\n\n| mistake | message |\n|---|---|\n"
        message = re.sub(r"^.*?error: ", "", answers[case.what].line)
        text += f"| {case.what} | {message.replace('|', chr(92) + '|')} |\n"
    return text
