"""A campaign of faults: runs are disturbed and started again until they finish, then compared.

    python -m ultramem_ds.testing.chaos [--trials 30] [--seed 0] [--work DIR] [--json FILE]

Each trial is a small run of two ranks and one fault at a random place (:data:`FAULTS`). The same
command is started again until the run says that it is finished. Then every number of its
``metrics.jsonl`` that does not measure time must equal, to the last digit, an undisturbed run's.
Besides: every start must end in bounded time and leave no process and no shared memory behind, and
no start may find less than the newest checkpoint that was complete before (but for trials that
damage it). ``model.dropout`` is on, so that random-number states count.

The plan is a function of the seed; where a kill hits within a step depends on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ultramem_ds.telemetry.report import markdown_table
from ultramem_ds.testing.disturbances import FAULTS
from ultramem_ds.testing.trials import Campaign, Trial

PRESETS = ("ultramem-debug", "moe-debug")


def tally(trials: Sequence[Trial]) -> str:
    """A table by fault, and the totals."""
    header = [
        "fault",
        "trials",
        "starts",
        "same series",
        "clear error",
        "wrong",
        "lost checkpoints",
    ]
    header += ["hangs", "orphans", "shared memory left"]

    def row(name: str, group: Sequence[Trial]) -> list[str]:
        numbers = [
            len(group),
            sum(t.starts for t in group),
            sum(t.identical for t in group),
            sum(t.clear_error for t in group),
            sum(bool(t.wrong) for t in group),
            sum(bool(t.lost_checkpoint) for t in group),
            sum(t.hung for t in group),
            sum(len(t.orphans) for t in group),
            sum(len(t.segments) for t in group),
        ]
        return [name, *map(str, numbers)]

    names = [name for name in FAULTS if any(t.fault == name for t in trials)]
    rows = [row(name, [t for t in trials if t.fault == name]) for name in names]
    return markdown_table(header, [*rows, row("all", trials)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; exit code 1 if a trial did not pass."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="kept afterwards; default: a temporary directory")
    parser.add_argument(
        "--json", type=Path, help="where to write every trial; with --work, goes on where it ends"
    )
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="only these")
    parser.add_argument("--preset", action="append", choices=PRESETS, help="only these")
    parser.add_argument("--minutes", type=float, help="start no trial after so long")
    arguments = parser.parse_args(argv)
    presets = arguments.preset or list(PRESETS)
    names = arguments.fault or list(FAULTS)
    with contextlib.ExitStack() as stack:
        work = arguments.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        campaign = Campaign(work.resolve(), arguments.seed)
        trials: list[Trial] = []
        if arguments.json is not None and arguments.work is not None and arguments.json.exists():
            trials = [Trial(**values) for values in json.loads(arguments.json.read_text())]
        began = time.monotonic()
        for number in range(len(trials), arguments.trials):
            fault = names[number % len(names)]
            # Both presets meet every fault when there are enough trials.
            preset = presets[(number + number // len(names)) % len(presets)]
            if arguments.minutes and time.monotonic() - began > 60 * arguments.minutes:
                print(f"{arguments.minutes:g} minutes are over after {number} trials")
                return 75  # not finished: the same command goes on
            trial = campaign.run(number, preset, fault, FAULTS[fault])
            trials.append(trial)
            state = "ok" if trial.passed else f"FAILED {trial.wrong or asdict(trial)}"
            print(
                f"{number:3d} {preset:15s} {fault:32s} {trial.starts} starts "
                f"{trial.seconds:5.1f} s  {state}  ({trial.detail})",
                flush=True,
            )
            if arguments.json is not None:
                content = json.dumps([asdict(t) for t in trials], indent=1)
                arguments.json.write_text(content + "\n")
    print("\n" + tally(trials))
    return 0 if all(trial.passed for trial in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
