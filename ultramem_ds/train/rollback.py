"""Going back to the last good checkpoint and around the data that came after it."""

from __future__ import annotations

from pathlib import Path

from ultramem_ds.data.skips import SkipRanges, format_ranges
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.watch.faultlog import log_fault
from ultramem_ds.watch.guards import TooManyBadStepsError

MAX_ROLLBACKS = 3  # of one process; what fails more often is not the data's fault


def roll_back(
    engine: TrainEngine,
    run_dir: Path,
    stop: TooManyBadStepsError,
    attempt: int,
    current: SkipRanges,
) -> tuple[int, SkipRanges]:
    """Reload the newest checkpoint from before the bad steps; all ranks together.

    Args:
        engine: of the run, wherever it is.
        run_dir: the run directory.
        stop: why.
        attempt: how often this process has been here, this time included.
        current: what the run jumps over.

    Returns:
        The optimizer steps that the checkpoint has taken, and what to jump over from there on: what
        is jumped over already and the samples of the bad steps.

    Raises:
        TooManyBadStepsError: ``stop`` itself, if ``train.rollback`` is off, there is no such
            checkpoint, or this has been tried often enough.
    """
    refusal = None
    if not engine.config.train.rollback:
        refusal = ""
    elif attempt > MAX_ROLLBACKS:
        refusal = f": {MAX_ROLLBACKS} rollbacks did not help"
    else:
        engine.comm.barrier()  # rank 0 has closed the metrics
        try:
            state = engine.load_last_good(run_dir, before=stop.steps[0].step)
        except ValueError as error:  # on every rank
            refusal = f": {error}"
    if refusal is not None:
        if engine.ranks.is_main:
            text = f"training stops after bad steps{refusal}"
            log_fault(run_dir, "stopped", text, steps=[bad.to_dict() for bad in stop.steps])
        raise stop
    engine.guard.recent = []
    bad = [piece for step in stop.steps for piece in step.samples]
    # What was jumped over since that checkpoint, by an earlier rollback or by option, stays so.
    skips = SkipRanges.of([*current.ranges, *state.skipped_samples, *bad])
    if engine.ranks.is_main:
        log_fault(
            run_dir,
            "rollback",
            f"rolling back to step {state.step} after {len(stop.steps)} bad steps; jumping over "
            f"samples {format_ranges(SkipRanges.of(bad).ranges)}",
            to_step=state.step,
            skipped_samples=[list(r) for r in bad],
        )
    return state.step, skips
