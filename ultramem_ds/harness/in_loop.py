"""Benchmark tasks on the model that is being trained, sharded as it is."""

from __future__ import annotations

import sys
from pathlib import Path

from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.harness.evaluation import run_tasks
from ultramem_ds.harness.lm import HarnessLM
from ultramem_ds.harness.names import split_names
from ultramem_ds.harness.report import cut_lines
from ultramem_ds.harness.service import Service
from ultramem_ds.harness.summary import summarise
from ultramem_ds.harness.tasks import TaskSet, load_tasks
from ultramem_ds.train.engine import TrainEngine
from ultramem_ds.train.run import Run


class LoopJudge:
    """The :class:`ultramem_ds.train.judge.Judge` of ``train.tasks``.

    Tasks are loaded once. A forward has no more tokens than a training micro-batch, whose
    activations and gradients are known to fit.

    Args:
        run: whose keys ``train.tasks``, ``train.tasks_limit`` and ``train.task_data`` count.
    """

    def __init__(self, run: Run) -> None:
        self._train = run.config.train
        self._seq_len = run.config.model.seq_len
        self._preset = run.config.preset
        self._tokenizer = load_tokenizer(run.data_dir)
        self._tasks: TaskSet | None = None
        self._warned = False

    def prepare(self) -> None:
        """See ``Judge``."""
        data = Path(self._train.task_data) if self._train.task_data else None
        names = split_names(self._train.tasks)
        self._tasks = load_tasks(names, data, lambda text: len(self._tokenizer.encode(text)))

    def evaluate(self, engine: TrainEngine) -> dict[str, float]:
        """See ``Judge``."""
        engine.engine.eval()
        service = Service(
            engine.model,
            self._tokenizer,
            max_tokens=engine.batches.micro_batch_size * self._seq_len,
            peers=engine.comm,
        )
        lm = HarnessLM(service, max_length=self._seq_len)
        with service.asking() as asks:
            if not asks or self._tasks is None:
                return {}
            results = run_tasks(lm, self._tasks, self._train.tasks_limit or None, bootstrap=0)
        rows = summarise(results, self._tasks, lm.cuts, self._preset)
        if not self._warned:
            for line in cut_lines(rows):
                print(f"WARNING: {line}", file=sys.stderr, flush=True)
            self._warned = True
        return {f"{row.task}/{row.metric.partition(',')[0]}": row.value for row in rows}
