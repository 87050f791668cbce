"""Import DeepSpeed the way this project needs it; everyone else imports ``deepspeed`` from here.

- What it logs and prints goes to the process's first stderr, so that ``--json`` output stays clean
  and that ``train`` can keep it off the console (``utils/console.py``).
- Its shared-memory all-reduce is switched off: only tensor-parallel inference uses it, but every
  start would build it (half a minute the first time, and a stale build lock blocks later starts)
  and leave 66 MB in ``/dev/shm`` per rank.
- Its Triton kernels, imported by every engine and run on GPUs alone, find no Triton elsewhere:
  that is 66 MB less in every process.
- What it marks as never to be compiled stays unmarked (:func:`without_compiler`): nothing here
  compiles it, and a mark loads torch's compiler, 100 MB and seconds in every process.
- Its marks for a profiler's timeline, some thousand calls a step, are off.
- Its Muon optimizer, which nothing here offers, stays uncompiled: every engine imports it, which
  would load torch's compiler at every start (1.6 s).
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    return _unmarked if function is None else function


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """Inside, marking a function as never to be compiled returns it as it is."""
    with (
        mock.patch.object(torch.compiler, "disable", _unmarked),
        mock.patch.object(torch, "_disable_dynamo", _unmarked),
    ):
        yield


with contextlib.redirect_stdout(sys.__stderr__), without_compiler():
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops
    import deepspeed.runtime.compiler
    import deepspeed.utils.nvtx
    from deepspeed.utils.tensor_fragment import fragment_address

    if not torch.cuda.is_available() and "triton" not in sys.modules:
        sys.modules["triton"] = None  # type: ignore[assignment]
        try:
            import deepspeed.ops.triton_ops
        finally:
            del sys.modules["triton"]

    with mock.patch.object(deepspeed.runtime.compiler, "compile", lambda: lambda code: code):
        import deepspeed.runtime.zero.muon.original_muon

deepspeed.utils.nvtx.enable_nvtx = False

# Raised by DeepSpeed's own calls of torch, once per call site and rank.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["check_engine_config", "deepspeed", "fragment_address", "without_compiler"]


def check_engine_config(engine_config: dict[str, Any]) -> None:
    """Let the installed DeepSpeed parse a config before anything is built.

    Args:
        engine_config: complete, as for ``deepspeed.initialize``, of any number of ranks.

    Raises:
        ValueError: naming the key that this version rejects.
    """
    micro, steps = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    one_rank = {
        **engine_config,
        "train_batch_size": engine_config[micro] * engine_config[steps],
    }
    try:
        with contextlib.redirect_stdout(sys.__stderr__):
            deepspeed.DeepSpeedConfig(one_rank)
    except Exception as error:  # DeepSpeed raises what its parser finds: many types
        reason = " ".join(str(error).split()).partition(" For further information")[0]
        raise ValueError(
            f"DeepSpeed {deepspeed.__version__} rejects the config: {reason}"
        ) from None
