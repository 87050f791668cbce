"""lm-evaluation-harness is an extra: say so where it is missing."""

from __future__ import annotations

import importlib.util
import logging


def require_lm_eval() -> None:
    """Check that the harness is installed, and quieten it: what matters is said here.

    Raises:
        ValueError: it is not; the message says which extra brings it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "tasks need lm-evaluation-harness, which is not installed: "
            "pip install 'ultramem_ds[eval]' (in a checkout: pip install -e '.[eval]')"
        )
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
