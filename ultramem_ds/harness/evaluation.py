"""Run tasks on a model through lm-evaluation-harness."""

from __future__ import annotations

import random
import time
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.evaluator import evaluate

from ultramem_ds.harness.lm import HarnessLM
from ultramem_ds.harness.quiet import without_bars
from ultramem_ds.harness.random_state import preserved_random_state
from ultramem_ds.harness.tasks import SEED, TaskSet

BOOTSTRAP = 100_000  # resamplings behind the standard errors that have no formula; lm-eval's own
SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": SEED}  # lm-eval's own


def run_tasks(
    lm: HarnessLM, tasks: TaskSet, limit: int | None = None, bootstrap: int = BOOTSTRAP
) -> dict[str, Any]:
    """lm-eval's results.

    Args:
        lm: the model; its count of cut requests goes on.
        tasks: may be evaluated again and again.
        limit: items of each task; None = all.
        bootstrap: resamplings; 0 = no standard errors.

    Returns:
        ``results``, ``configs``, ``versions``, ``n-shot``, ``n-samples`` and more, as lm-eval's
        own command writes them; and ``elapsed_s``.
    """
    begin = time.perf_counter()
    with preserved_random_state(), without_bars():
        random.seed(SEEDS["random"])
        np.random.seed(SEEDS["numpy"])
        torch.manual_seed(SEEDS["torch"])
        for task in tasks.loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEEDS["fewshot"])
        results = evaluate(
            lm=lm,
            task_dict=tasks.loaded,
            limit=limit,
            bootstrap_iters=bootstrap,
            log_samples=False,
        )
    assert results is not None
    return {**results, "lm_eval_version": lm_eval.__version__, "elapsed_s": _since(begin)}


def _since(begin: float) -> float:
    return round(time.perf_counter() - begin, 3)
