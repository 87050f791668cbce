"""What the training loop asks of benchmark tasks; ``harness/in_loop`` answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.train.run import Run


class Judge(Protocol):
    """Evaluates the live model on ``train.tasks``."""

    def prepare(self) -> None:
        """Load the tasks; the first rank only, before anything is built or written.

        Raises:
            ValueError: an unknown task, or data that is missing.
        """
        ...

    def evaluate(self, engine: TrainEngine) -> dict[str, float]:
        """Results by ``task/metric``; all ranks call this together, the first one gets them.

        Parameters, random numbers and statistics of training stay as they are.
        """
        ...


MakeJudge: TypeAlias = Callable[[Run], Judge]
