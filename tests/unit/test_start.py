"""What starting a process costs."""

from __future__ import annotations

import subprocess
import sys

ENGINE_IMPORTS = """
import sys
from ultramem_ds.zero.deepspeed_import import deepspeed
import deepspeed.runtime.engine
import deepspeed.runtime.zero.muon.muon_optimizer
print("torch._inductor.compile_fx" in sys.modules)
"""


def test_an_engine_does_not_load_the_compiler() -> None:
    """DeepSpeed's Muon optimizer, imported by its check of any optimizer, would."""
    found = subprocess.run([sys.executable, "-c", ENGINE_IMPORTS], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "False"
