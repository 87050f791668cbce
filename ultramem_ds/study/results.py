"""What a study's finished runs measured, and the statistics of its lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ultramem_ds.model.accounting import count
from ultramem_ds.study.expand import Line, Trial
from ultramem_ds.study.run import is_finished
from ultramem_ds.telemetry.metrics import METRICS, VALIDATION, read_lines

LAST_SHARE = 0.1  # of the steps, whose mean is a run's training loss
MAX_CURVE_POINTS = 50  # of a curve in the JSON
STATE_KEYS = ("top1_score", "output_std", "output_share", "recall", "rows_touched", "rows_kl")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished run, small enough to be committed.

    Attributes:
        validation: (tokens, loss) at every validation, and per subset.
        training: (tokens, mean loss since the point before).
        state: statistics of the last memory layer, (tokens, value) by name.
    """

    line: str
    seed: int
    tokens: int
    training_flops: float
    params: int
    sparse_params: int
    flops_per_token: int
    train_loss: float
    val_loss: float
    validation: dict[str, list[tuple[int, float]]]
    training: list[tuple[int, float]]
    grad_norm: list[tuple[int, float]]
    state: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain form, numbers rounded to what they mean."""
        return {key: _rounded(value) for key, value in asdict(self).items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(item) for item in value]
    return value


def read_results(trials: Sequence[Trial], output: Path) -> list[RunResult]:
    """The finished ones among ``trials``, in order."""
    return [_read(trial, output) for trial in trials if is_finished(trial, output)]


def _read(trial: Trial, output: Path) -> RunResult:
    run_dir = output / trial.run_dir
    metrics = read_lines(run_dir / METRICS)
    per_step = trial.tokens // trial.steps
    validation: dict[str, list[tuple[int, float]]] = {}
    for record in read_lines(run_dir / VALIDATION):
        for subset, loss in record.items():
            if subset != "step":
                validation.setdefault(subset, []).append((record["step"] * per_step, loss))
    if "all" not in validation:
        raise ValueError(f"{run_dir} has no validation loss: the data hold no validation split")
    losses = [record["loss"] for record in metrics if record["loss"] is not None]
    size = count(trial.config)
    last_layer = len(trial.config.memory.spans) - 1
    state = {
        name: [
            (record["tokens"], record[key])
            for record in metrics
            if record.get(key := f"layer_{last_layer}/{name}") is not None
        ]
        for name in STATE_KEYS
    }
    return RunResult(
        line=trial.line.name,
        seed=trial.seed,
        tokens=trial.tokens,
        training_flops=trial.training_flops,
        params=size.params,
        sparse_params=size.sparse_params,
        flops_per_token=size.flops_per_token,
        train_loss=mean(losses[-max(1, round(LAST_SHARE * len(losses))) :]),
        val_loss=validation["all"][-1][1],
        validation={subset: _sampled(curve) for subset, curve in validation.items()},
        training=_thinned(metrics, "loss"),
        grad_norm=_thinned(metrics, "grad_norm"),
        state={name: _sampled(curve) for name, curve in state.items() if curve},
    )


def _sampled(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most ``MAX_CURVE_POINTS`` of the points, evenly, the last among them."""
    every = math.ceil(len(curve) / MAX_CURVE_POINTS)
    return curve[::-1][::every][::-1]


def _thinned(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """At most ``MAX_CURVE_POINTS`` means over equal stretches."""
    good = [(record["tokens"], record[key]) for record in metrics if record[key] is not None]
    width = max(1, math.ceil(len(good) / MAX_CURVE_POINTS))
    stretches = [good[i : i + width] for i in range(0, len(good), width)]
    return [(part[-1][0], mean(value for _, value in part)) for part in stretches]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired difference of two lines over their common seeds, nats.

    Attributes:
        error: standard error of ``mean``; NaN with one seed.
        p: two-sided, of Student's paired t-test; NaN with one seed.
    """

    mean: float
    error: float
    p: float
    num_seeds: int

    @property
    def mark(self) -> str:
        """``**`` below 1%, ``*`` below 5%, ``?`` where one seed allows no test, else nothing."""
        if math.isnan(self.p):
            return "?"
        return "**" if self.p < 0.01 else "*" if self.p < 0.05 else ""


def paired_difference(of: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Difference ``of - reference`` over the seeds of both; None without a common one."""
    differences = [of[seed] - reference[seed] for seed in sorted(of.keys() & reference.keys())]
    if not differences:
        return None
    if len(differences) == 1:
        return Difference(mean=differences[0], error=math.nan, p=math.nan, num_seeds=1)
    from scipy.stats import ttest_1samp

    error = standard_error(differences)
    p = float(ttest_1samp(differences, 0.0).pvalue) if error else float(mean(differences) == 0)
    return Difference(mean=mean(differences), error=error, p=p, num_seeds=len(differences))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for one value."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A line of the table at one token budget."""

    line: Line
    tokens: int
    train: dict[int, float]  # by seed, nats
    valid: dict[int, float]
    train_difference: Difference | None
    valid_difference: Difference | None


def summarise(
    lines: Sequence[Line], results: Sequence[RunResult], budgets: Sequence[int]
) -> list[Summary]:
    """Lines with at least one finished run, budget by budget.

    Args:
        lines: in the table's order.
        results: finished runs.
        budgets: tokens of the runs, as trials have them (whole steps).
    """
    found = []
    for tokens in budgets:
        train: dict[str, dict[int, float]] = {line.name: {} for line in lines}
        valid: dict[str, dict[int, float]] = {line.name: {} for line in lines}
        for result in results:
            if result.tokens == tokens:
                train[result.line][result.seed] = result.train_loss
                valid[result.line][result.seed] = result.val_loss
        for line in lines:
            if not valid[line.name]:
                continue
            reference = line.compare
            found.append(
                Summary(
                    line=line,
                    tokens=tokens,
                    train=train[line.name],
                    valid=valid[line.name],
                    train_difference=paired_difference(train[line.name], train[reference])
                    if reference
                    else None,
                    valid_difference=paired_difference(valid[line.name], valid[reference])
                    if reference
                    else None,
                )
            )
    return found
