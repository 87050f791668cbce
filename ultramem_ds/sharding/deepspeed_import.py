"""Import DeepSpeed the way this project needs it; everyone else imports ``deepspeed`` from here.

- What it logs and prints at import goes to stderr, so that ``--json`` output stays clean.
- Its shared-memory all-reduce is switched off: only tensor-parallel inference uses it, but every
  start would build it (half a minute the first time, and a stale build lock blocks later starts)
  and leave 66 MB in ``/dev/shm`` per rank.
"""

from __future__ import annotations

import contextlib
import sys
import warnings

with contextlib.redirect_stdout(sys.stderr):
    import deepspeed
    import deepspeed.comm
    import deepspeed.ops

# Raised by DeepSpeed's own calls of torch, once per call site and rank.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

__all__ = ["deepspeed"]
