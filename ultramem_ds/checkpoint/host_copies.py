"""Copies of live state in host memory, to be written while training goes on."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


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
