"""What DeepSpeed saves, caught before it touches a file: to be written later, by another thread.

``engine.save_checkpoint`` mixes collectives and file writes. :class:`CapturingEngine` stands in for
DeepSpeed's checkpoint engine: saving only remembers objects (and the collectives run), loading goes
through the restricted reader. The objects are the live state; :class:`HostCopies` copies them to
host memory where training goes on while they are written.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ultramem_ds.elastic.record import Store, write_rank_layout
from ultramem_ds.elastic.safe import safe_load
from ultramem_ds.sharding.deepspeed_import import deepspeed


class CapturingEngine(deepspeed.runtime.checkpoint_engine.TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, without files on the way out and without code on the way in.

    Attributes:
        captured: object by absolute path, of the save in progress.
    """

    def __init__(self) -> None:
        super().__init__()
        self.captured: dict[str, Any] = {}

    def create(self, info: Any) -> None:
        """A save begins."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Directories are made when files are written."""

    def save(self, state_dict: Any, path: str) -> None:
        """Remember what belongs at ``path``."""
        self.captured[path] = state_dict

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read into memory: DeepSpeed keeps some of the tensors, and the file may be pruned."""
        return safe_load(Path(path), mmap=False)

    def take(self) -> dict[str, Any]:
        """What has been captured since the last call."""
        captured, self.captured = self.captured, {}
        return captured


@dataclass(frozen=True)
class RankFiles:
    """One rank's part of a checkpoint, not yet on disk.

    Attributes:
        rank: whose.
        sources: what gives the object that ``torch.save`` is to write, by file name.
        stores: where optimizer state lies in those files.
    """

    rank: int
    sources: dict[str, Callable[[], Any]]
    stores: dict[str, Store]

    def write(self, checkpoint: Path) -> None:
        """Write and fsync everything, this rank's record last.

        Raises:
            OSError: a file could not be written completely.
        """
        checkpoint.mkdir(parents=True, exist_ok=True)
        for name, source in self.sources.items():
            _write(checkpoint / name, source())
        if self.rank == 0:
            _copy_recovery_scripts(checkpoint.parent)
        write_rank_layout(checkpoint, self.rank, self.stores, self.sources)


def _write(path: Path, value: Any) -> None:
    """``torch.save``, whose zip writer may turn the error of a full disk into its own."""
    try:
        with open(path, "wb") as file:
            torch.save(value, file)
    except RuntimeError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise (cause or OSError(str(error))) from None


def _copy_recovery_scripts(directory: Path) -> None:
    """DeepSpeed's ``zero_to_fp32.py`` and its like, beside the checkpoints as DeepSpeed does."""
    source = Path(deepspeed.__file__).parent / "utils"
    for name in ("zero_to_fp32.py", "zero_to_torch.py"):
        if not (directory / name).exists():
            partial = directory / f".tmp-{name}"
            shutil.copyfile(source / name, partial)
            partial.chmod(0o755)
            os.replace(partial, directory / name)


class HostCopies:
    """Copies of nested state in host memory that is kept and filled again by the next save."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def copy(self, objects: Mapping[str, Any]) -> dict[str, Any]:
        """The same containers with tensors copied; whatever shared storage or identity still does.

        Overwrites what the previous call returned. Done when it returns, on any device.
        """
        memo: dict[int, Any] = {}
        storages: dict[int, Tensor] = {}
        copied: dict[str, Any] = self._copy(dict(objects), memo, storages)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, memo: dict[int, Any], storages: dict[int, Tensor]) -> Any:
        if id(value) in memo:
            return memo[id(value)]
        copied = value
        if isinstance(value, Tensor):
            copied = self._copy_tensor(value, storages)
            vars(copied).update(self._copy(vars(value), memo, storages))  # saved with it
        elif type(value) in (dict, OrderedDict, defaultdict):
            copied = copy.copy(value)  # with the attributes that an OrderedDict may carry
            for key, item in value.items():
                copied[key] = self._copy(item, memo, storages)
        elif type(value) in (list, tuple):
            copied = type(value)(self._copy(item, memo, storages) for item in value)
        memo[id(value)] = copied
        return copied

    def _copy_tensor(self, value: Tensor, storages: dict[int, Tensor]) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = self._fill(len(storages), storage, value.device)
        host = storages[storage._cdata].untyped_storage()
        copied = torch.empty(0, dtype=value.dtype).set_(
            host, value.storage_offset(), value.size(), value.stride()
        )
        if isinstance(value, nn.Parameter):
            return nn.Parameter(copied, requires_grad=value.requires_grad)
        return copied.requires_grad_(value.requires_grad)

    def _fill(self, index: int, storage: torch.UntypedStorage, device: torch.device) -> Tensor:
        """Copy one storage into buffer ``index``: the order is the same in every save."""
        if index == len(self._buffers):
            self._buffers.append(torch.empty(0, dtype=torch.uint8))
        if self._buffers[index].numel() != storage.nbytes():
            pinned = device.type == "cuda"
            size = storage.nbytes()
            self._buffers[index] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        live = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        self._buffers[index].copy_(live, non_blocking=True)
        return self._buffers[index]
