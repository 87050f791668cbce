"""How many unusable records a preparation may have, and giving up where that is hopeless."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field

from ultramem_ds.data.unit import Unit
from ultramem_ds.data.units import UnitSummary

logger = logging.getLogger(__name__)

_FREE_BAD_RECORDS = 20  # always tolerated, whatever the share
_WARNINGS = 20  # bad records named on the console
# Work stops early when even this many times as many records per byte in the rest of the input
# could not bring the share of bad records below the limit.
_HOPE = 10.0


@dataclass(frozen=True)
class BadRecordLimit:
    """What is tolerated.

    Attributes:
        max_share: of the records.
        free: records tolerated whatever the share.
    """

    max_share: float
    free: int = _FREE_BAD_RECORDS

    def check(self, bad: Counter[str], num_records: int, *, still_to_come: float = 0.0) -> None:
        """Raise ValueError if more records are bad than allowed.

        Args:
            bad: bad records by reason.
            num_records: records read.
            still_to_come: good records to assume beyond those read.
        """
        num_bad = bad.total()
        if num_bad <= max(self.free, self.max_share * (num_records + still_to_come)):
            return
        reasons = ", ".join(f"{count} x {reason}" for reason, count in bad.most_common())
        if not self.free:
            raise ValueError(
                f"--strict: {num_bad} of the {num_records} records read are unusable ({reasons})"
            )
        raise ValueError(
            f"{num_bad} of the {num_records} records read are unusable ({reasons}), more than "
            f"{self.max_share:.2%} of all and {self.free}. Check the input, or raise "
            "--max-bad-share"
        )


STRICT = BadRecordLimit(max_share=0.0, free=0)


@dataclass
class BadRecordWatch:
    """Names bad records as they are found and gives up on hopeless inputs."""

    limit: BadRecordLimit
    total_bytes: int
    _done_bytes: int = 0
    _records: int = 0
    _bad: Counter[str] = field(default_factory=Counter)
    _warnings: int = 0

    def add(self, unit: Unit, summary: UnitSummary) -> None:
        """Count a finished unit.

        Raises:
            ValueError: if the limit on bad records can hardly be kept any more.
        """
        for offset, reason in summary.reports[: _WARNINGS - self._warnings]:
            logger.warning("skipped %s at %d: %s", unit.path, offset, reason)
            self._warnings += 1
        self._done_bytes += unit.num_bytes
        self._records += summary.num_records
        self._bad.update(summary.bad)
        rest = self.total_bytes / max(self._done_bytes, 1) - 1
        self.limit.check(self._bad, self._records, still_to_come=self._records * _HOPE * rest)
