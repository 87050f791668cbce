r"""The normal command line with faults thrown in: run instead of ``ultramem_ds``, for tests.

    ULTRAMEM_FAULTS="nan@3:1 kill@5:0:save" \
        deepspeed --no_local_rank --module ultramem_ds.testing.faults train ...

Each fault is ``WHAT@STEP:RANK[:PHASE]``: on that rank, when optimizer step STEP (counted from 1)
enters that phase for the first time, by default ``forward``. A step may be ``A-B``, for every step
from A to B. With ULTRAMEM_FAULTS_DONE=DIR a
fault that has happened leaves a file there and does not happen again.

The code that is shipped knows nothing of this: hooks and wrappers are installed around it.

| what | does |
|---|---|
| nan | makes the loss of the forward NaN |
| nangrad | makes the gradient NaN behind a finite loss |
| spike | multiplies the gradient by 10^6 |
| raise | raises RuntimeError |
| badvalue | raises ValueError |
| stall | sleeps for ever |
| pause | sleeps for five seconds |
| freeze | stops the process (SIGSTOP) |
| kill | kills the process (SIGKILL) |
| term | sends the process SIGTERM |
| killlauncher | kills the process that started this one |
| drift | changes a replicated parameter |
| badrow | looks up a row that the table does not have |
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PLAN = "ULTRAMEM_FAULTS"
DONE = "ULTRAMEM_FAULTS_DONE"

_FAULT = re.compile(r"^([a-z]+)@(\d+)(?:-(\d+))?:(\d+)(?::(\w+))?$")
_IN_MODEL = ("nan", "nangrad", "spike", "drift")  # done where the loss is at hand
_IN_LOOKUP = ("badrow",)


@dataclass(frozen=True)
class Fault:
    """One line of a plan; see the module."""

    what: str
    first: int
    last: int
    rank: int
    phase: str

    @classmethod
    def parse(cls, text: str) -> Fault:
        """``WHAT@STEP:RANK[:PHASE]``."""
        match = _FAULT.match(text)
        if match is None:
            raise ValueError(f"{PLAN}: {text!r} is not WHAT@STEP:RANK[:PHASE]")
        what, first, last, rank, phase = match.groups()
        return cls(what, int(first), int(last or first), int(rank), phase or "forward")

    def __str__(self) -> str:
        return f"{self.what}@{self.first}-{self.last}:{self.rank}:{self.phase}"


class Injector:
    """Makes the faults of a plan happen on this rank.

    Args:
        plan: all ranks' faults.
        rank: this rank.
        done_dir: where faults that happened leave a file; None lets them happen at every start.
    """

    def __init__(self, plan: list[Fault], rank: int, done_dir: Path | None) -> None:
        self.faults = [fault for fault in plan if fault.rank == rank]
        self.done_dir = done_dir

    def entered(self, step: int, phase: str) -> None:
        """The run is at ``step`` and has entered ``phase``."""
        for fault in self.faults:
            elsewhere = fault.what in (*_IN_MODEL, *_IN_LOOKUP)
            if not elsewhere and fault.phase == phase and self._take(fault, step):
                self._do(fault.what)

    def rows(self, rows_TK: torch.Tensor, step: int) -> torch.Tensor:
        """What the rows of a lookup of ``step`` become."""
        for fault in self.faults:
            if fault.what in _IN_LOOKUP and self._take(fault, step):
                rows_TK = rows_TK.clone()
                rows_TK[0, 0] = 10**9
        return rows_TK

    def loss(self, model: torch.nn.Module, loss: torch.Tensor, step: int) -> torch.Tensor:
        """What the loss of a forward of ``step`` becomes."""
        for fault in self.faults:
            if fault.what in _IN_MODEL and self._take(fault, step):
                if fault.what == "nan":
                    loss = loss * torch.nan
                elif fault.what == "drift":
                    _drift(model)
                else:
                    factor = torch.nan if fault.what == "nangrad" else 1e6
                    loss.register_hook(lambda grad, factor=factor: grad * factor)
        return loss

    def _take(self, fault: Fault, step: int) -> bool:
        if not fault.first <= step <= fault.last:
            return False
        if self.done_dir is not None:
            file = self.done_dir / f"{fault}-{step}"
            if file.exists():
                return False
            file.touch()
        return True

    def _do(self, what: str) -> None:
        print(f"fault injected: {what}", file=sys.stderr, flush=True)
        if what == "raise":
            raise RuntimeError("injected failure")
        if what == "badvalue":
            raise ValueError("injected bad value")
        if what == "stall":
            time.sleep(1e6)
        elif what == "pause":
            time.sleep(5.0)
        elif what == "killlauncher":
            os.kill(os.getppid(), signal.SIGKILL)
        else:
            signals = {"kill": "SIGKILL", "term": "SIGTERM", "freeze": "SIGSTOP"}
            os.kill(os.getpid(), signal.Signals[signals[what]])


def _drift(model: torch.nn.Module) -> None:
    """Change what every rank should hold alike."""
    for param in model.parameters():
        if param.numel() and (not hasattr(param, "ds_persist") or param.ds_persist):
            with torch.no_grad():
                param.view(-1)[0] += 1.0
            return


def install(injector: Injector) -> None:
    """Wrap the phases and the engine's model, from outside."""
    from ultramem_ds.telemetry.phases import Phases
    from ultramem_ds.train.engine import TrainEngine

    switch = Phases._switch

    def switching(phases: Any, name: str) -> None:
        switch(phases, name)
        injector.entered(phases.step, name)

    build = TrainEngine.__init__

    def building(engine: Any, *args: Any, **options: Any) -> None:
        build(engine, *args, **options)

        def hook(model: Any, _: Any, terms: dict[str, Any]) -> dict[str, Any] | None:
            if not model.training:
                return None
            return {**terms, "loss": injector.loss(model, terms["loss"], engine.phases.step)}

        engine.model.register_forward_hook(hook)
        for memory in engine.model.memory_layers:
            memory.lookup.start = looking_up(memory.lookup.start, engine)

    def looking_up(start: Any, engine: Any) -> Any:
        return lambda rows_TK, *rest: start(injector.rows(rows_TK, engine.phases.step), *rest)

    Phases._switch = switching  # type: ignore[method-assign, assignment]
    TrainEngine.__init__ = building  # type: ignore[method-assign, assignment]


def main() -> None:
    """Install the plan of the environment, then run the command line."""
    plan = [Fault.parse(text) for text in os.environ.get(PLAN, "").split()]
    done = os.environ.get(DONE)
    install(Injector(plan, int(os.environ.get("RANK", "0")), Path(done) if done else None))
    runpy.run_module("ultramem_ds", run_name="__main__")


if __name__ == "__main__":
    main()
