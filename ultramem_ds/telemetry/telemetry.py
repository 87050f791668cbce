"""What a step cost on this rank: speed, time by phase, gradient norms' parts, memory, traffic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ultramem_ds.config.schema import Config
from ultramem_ds.model.accounting import training_flops_per_token
from ultramem_ds.telemetry.memory_use import memory_bytes, peak_memory_bytes
from ultramem_ds.telemetry.peak_flops import peak_flops_per_s
from ultramem_ds.telemetry.phases import START, Phases
from ultramem_ds.zero.runtime import Ranks

if TYPE_CHECKING:
    from ultramem_ds.zero.parallelize import ParallelModel


class Telemetry:
    """Reads the instruments once per optimizer step; only the ones of this rank, no collective.

    Args:
        config: resolved configuration.
        ranks: where this process stands.
        parallel: the model's counters of bytes and its gradient norms.
        phases: the clock of the step.

    Attributes:
        peak_source: where the peak FLOP/s are from, in words.
        totals_s: seconds by phase since the first step.
    """

    def __init__(
        self, config: Config, ranks: Ranks, parallel: ParallelModel, phases: Phases
    ) -> None:
        self._flops_per_token = training_flops_per_token(config)
        peak, self.peak_source = peak_flops_per_s(ranks.device, config.train.precision)
        self._peak_flops_per_s = peak * ranks.world_size
        self._device = ranks.device
        self._norms = parallel.gradient_norms
        self._comms = parallel.table_comms
        self._sent: Counter[str] = Counter()
        self._phases = phases
        self._between: dict[str, float] = {}
        self.totals_s: dict[str, float] = {}

    def start(self) -> None:
        """Forget what came before the first step."""
        self._phases.take_seconds()
        self._sent = self._bytes_sent()

    def charge(self, phase: str) -> None:
        """Call after ``phase``, between steps: its forwards are no step's lookups or traffic."""
        _add(self._between, {phase: sum(self._phases.take_seconds().values())})
        self._sent = self._bytes_sent()

    def read(self, tokens_per_s: float) -> dict[str, float]:
        """Numbers for a line of ``metrics.jsonl`` (docs/monitoring.md lists them).

        ``time_s/*`` is everything since the last call: the validation and the save that follow a
        step stand in the next step's line.
        """
        seconds = self._take_seconds()
        _add(self.totals_s, seconds)
        flops_per_s = tokens_per_s * self._flops_per_token
        record: dict[str, float] = {
            **self._norms.read(),
            "model_flops_per_s": flops_per_s,
            "mfu": flops_per_s / self._peak_flops_per_s,
            "memory_bytes": memory_bytes(self._device),
            "peak_memory_bytes": peak_memory_bytes(self._device),
            **{f"time_s/{name}": value for name, value in seconds.items()},
        }
        if self._comms:
            sent = self._bytes_sent()
            new = sent - self._sent
            self._sent = sent
            record |= {f"wire_bytes/{name}": float(size) for name, size in new.items()}
            record["wire_bytes/total"] = float(sum(new.values()))
        return record

    def finish(self) -> dict[str, float]:
        """Seconds of rank 0 by phase since the first step, up to now."""
        _add(self.totals_s, self._take_seconds())
        return {name: round(seconds, 3) for name, seconds in self.totals_s.items()}

    def _take_seconds(self) -> dict[str, float]:
        seconds = {k: v for k, v in self._phases.take_seconds().items() if k != START}
        _add(seconds, self._between)
        self._between = {}
        return seconds

    def _bytes_sent(self) -> Counter[str]:
        """Bytes that lookups and copies of the tables have sent from this rank, by category."""
        total: Counter[str] = Counter()
        for comm in self._comms:
            for (category, _), size in comm.bytes_sent.items():
                total[category] += size
        return total


def _add(totals: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        totals[name] = totals.get(name, 0.0) + value
