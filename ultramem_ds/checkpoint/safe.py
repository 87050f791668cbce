"""Files from a checkpoint directory are data: they run no code and lead to no other place.

Pickles are read by torch's restricted unpickler, which knows tensors and plain containers, plus the
few classes that DeepSpeed writes beside them. Names in records are followed only inside their own
directory.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch


class DamagedCheckpointError(ValueError):
    """A checkpoint cannot be used: torn, altered or unsafe. An earlier one may be good."""


class _Fields:
    """In place of a class that is only passed over: keeps what it is given, does nothing."""

    def __init__(self, *args: object) -> None:
        self.args = args


# What DeepSpeed's optimizer files hold beside tensors and plain containers; the engine that takes
# them up passes the real classes.
_PASSED_OVER = tuple(
    (type(name.rpartition(".")[2], (_Fields,), {}), name)
    for name in (
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
)
_REFUSED = re.compile(r"GLOBAL ([\w.]+)")  # in the message of torch's restricted unpickler


def safe_load(path: Path, *, mmap: bool = True, classes: Sequence[Any] = _PASSED_OVER) -> Any:
    """Read what ``torch.save`` wrote, on the CPU, without running any code that it names.

    Args:
        path: the file.
        mmap: map it into memory, so that only tensors that are looked at are read.
        classes: what may be made beside tensors and plain containers.

    Raises:
        DamagedCheckpointError: it cannot be read, or asks for a function or class that is not a
            tensor's; the message names file and function.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except pickle.UnpicklingError as error:
        found = _REFUSED.search(str(error))
        asks = f"asks for {found[1]}, which" if found else "holds something that"
        raise DamagedCheckpointError(
            f"{path} is refused: it {asks} is no part of a checkpoint. Loading it could run "
            "code of whoever wrote it; nothing was run"
        ) from None
    except Exception as error:  # a damaged file raises whatever its reader stumbles over
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedCheckpointError(f"{path} cannot be read: {reason}") from None


def member(directory: Path, name: object) -> Path:
    """The file that a record in ``directory`` calls ``name``, which must lie inside.

    Raises:
        DamagedCheckpointError: the name is absolute, climbs out or leads through a symbolic link.
    """
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or ".." in parts or str(name).startswith("/") or "\0" in str(name):
        raise DamagedCheckpointError(
            f"{directory} is refused: it names a file {name!r}, which is not inside it"
        )
    path = directory
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise DamagedCheckpointError(
                f"{path} is refused: it is a symbolic link, and checkpoints hold none; copy the "
                "file itself here if you trust it"
            )
    return path
