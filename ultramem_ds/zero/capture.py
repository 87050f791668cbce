"""What DeepSpeed saves, caught before it touches a file: to be written later, by another thread.

``engine.save_checkpoint`` mixes collectives and file writes. :class:`CapturingEngine` stands in for
DeepSpeed's checkpoint engine: saving only remembers objects (and the collectives run), loading goes
through the restricted reader.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultramem_ds.checkpoint.safe import safe_load
from ultramem_ds.zero.deepspeed_import import deepspeed, fragment_address

# What DeepSpeed's optimizer files hold beside tensors and plain containers. Making one of these, of
# whatever arguments, does nothing but fill its fields.
STATE_CLASSES = (
    deepspeed.runtime.zero.config.ZeroStageEnum,
    deepspeed.runtime.fp16.loss_scaler.LossScaler,
    fragment_address,
)


class CapturingEngine(deepspeed.runtime.checkpoint_engine.TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, without files on the way out and without code on the way in.

    Args:
        left_out: tells by name the files that DeepSpeed would write and that hold nothing.

    Attributes:
        captured: object by absolute path, of the save in progress.
    """

    def __init__(self, left_out: Callable[[str], bool]) -> None:
        super().__init__()
        self._left_out = left_out
        self.captured: dict[str, Any] = {}

    def create(self, info: Any) -> None:
        """A save begins."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Directories are made when files are written."""

    def save(self, state_dict: Any, path: str) -> None:
        """Remember what belongs at ``path``."""
        if not self._left_out(Path(path).name):
            self.captured[path] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read into memory: DeepSpeed keeps some of the tensors, and the file may be pruned."""
        if self._left_out(Path(path).name):
            return {}
        return safe_load(Path(path), mmap=False, classes=STATE_CLASSES)

    def take(self) -> dict[str, Any]:
        """What has been captured since the last call."""
        captured, self.captured = self.captured, {}
        return captured


def copy_recovery_scripts(directory: Path) -> None:
    """DeepSpeed's ``zero_to_fp32.py`` and its like, beside the checkpoints as DeepSpeed does."""
    source = Path(deepspeed.__file__).parent / "utils"
    for name in ("zero_to_fp32.py", "zero_to_torch.py"):
        if not (directory / name).exists():
            partial = directory / f".tmp-{name}"
            shutil.copyfile(source / name, partial)
            partial.chmod(0o755)
            os.replace(partial, directory / name)
