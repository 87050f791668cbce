"""The libraries' own bars and warnings, silenced: what matters is said here."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import datasets
import lm_eval.api.task


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """No bar for each task of a group and each map over a split: the service's is enough."""
    own = lm_eval.api.task.tqdm
    disabled = datasets.are_progress_bars_disabled()
    lm_eval.api.task.tqdm = functools.partial(own, disable=True)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = own
        if not disabled:
            datasets.enable_progress_bars()
