"""What a check says, and how findings are shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

Status: TypeAlias = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        area: what was looked at: ``python``, ``kernels``, ``machine``, ``disk``, ``ranks``, ...
        status: ``fail`` must be fixed, ``warn`` costs speed or a feature.
        what: what was found, one line.
        fix: what to do; empty if nothing.
    """

    area: str
    status: Status
    what: str
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.fix, f"{self.what}: a problem without a way out"


def must_fix(findings: Iterable[Finding]) -> bool:
    """Whether something must be fixed before training."""
    return any(finding.status == "fail" for finding in findings)


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """Plain values for ``--json``."""
    return {"ok": not must_fix(findings), "findings": [asdict(f) for f in findings]}


def describe(findings: list[Finding]) -> str:
    """Findings as text, a line each and the fix below it."""
    lines = []
    for finding in findings:
        mark = finding.status.upper() if finding.status == "fail" else finding.status
        lines.append(f"{mark:5}{finding.area:9} {finding.what}")
        if finding.fix:
            lines.append(f"{'':15}-> {finding.fix}")
    failed = sum(finding.status == "fail" for finding in findings)
    warned = sum(finding.status == "warn" for finding in findings)
    verdict = f"{failed} to fix before training" if failed else "ready to train"
    return "\n".join([*lines, f"{verdict}, {warned} warnings"])
