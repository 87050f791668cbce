"""The smallest piece of work of ``prepare``."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from ultramem_ds.data.compression import Compression

UnitKind: TypeAlias = Literal["lines", "values", "text", "parquet", "hub"]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One piece of work.

    ``begin`` and ``end`` are bytes of a plain file of lines (the unit has the lines that start
    there) and cover the whole file for others; for ``parquet`` and ``hub`` the unit is shard
    ``begin`` of ``end``. ``subset`` is where records go that do not name one themselves.
    """

    kind: UnitKind
    path: str  # file, or hub id "OWNER/NAME[:CONFIG[:SPLIT]]"
    name: str  # of the file inside its input, for reports and for the order
    subset: str
    size: int  # bytes of the whole file
    modified_ns: int
    begin: int
    end: int
    compression: Compression | None = None
    encoding: str = "utf-8"

    @property
    def key(self) -> str:
        """Name that changes whenever the content might."""
        text = json.dumps({**asdict(self), "name": None}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @property
    def num_bytes(self) -> int:
        """Input bytes (as stored) the unit stands for, for progress."""
        if self.kind in ("parquet", "hub"):
            return self.size * (self.begin + 1) // self.end - self.size * self.begin // self.end
        return self.end - self.begin
