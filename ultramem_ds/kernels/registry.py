"""Which implementations exist here, which one is used, and why.

``reference`` is the oracle, ``embedding-bag`` torch's library kernels on any device, ``cpu`` the
native extension (built at first use; embedding-bag's code where it cannot be built).

``triton`` and ``triton-atomic`` are for CUDA. ``kernel="auto"`` takes the first available name of
the device's list; ``ULTRAMEM_KERNEL=name`` in the environment wins over every argument.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ultramem_ds.kernels.base import Kernel
from ultramem_ds.kernels.build import BuildError, build
from ultramem_ds.kernels.cpu import NativeKernel
from ultramem_ds.kernels.embedding_bag import EmbeddingBagKernel
from ultramem_ds.kernels.native import load_library
from ultramem_ds.kernels.reference import ReferenceKernel

_LOGGER = logging.getLogger(__name__)

ENVIRONMENT_KEY = "ULTRAMEM_KERNEL"


@dataclass(frozen=True)
class Choice:
    """An implementation for one device, or why there is none.

    Attributes:
        kernel: the implementation; None if it cannot run here.
        reason: what was found, for people.
    """

    kernel: Kernel | None
    reason: str


def _reference(device: torch.device) -> Choice:
    return Choice(ReferenceKernel(), "plain torch, the oracle")


def _embedding_bag(device: torch.device) -> Choice:
    return Choice(EmbeddingBagKernel(), "torch's embedding_bag")


def _cpu(device: torch.device) -> Choice:
    if device.type != "cpu":
        return Choice(None, f"runs on cpu, the table is on {device.type}")
    try:
        path = build()
        return Choice(NativeKernel(load_library(path)), f"native extension {path}")
    except (BuildError, OSError) as error:
        _LOGGER.warning("native lookup extension unavailable, using embedding_bag: %s", error)
        return Choice(
            EmbeddingBagKernel(), f"torch's embedding_bag, for want of native code: {error}"
        )


def _triton(device: torch.device) -> Choice:
    return _triton_class("TritonKernel", device, "deterministic")


def _triton_atomic(device: torch.device) -> Choice:
    return _triton_class("TritonAtomicKernel", device, "atomic additions")


def _triton_class(class_name: str, device: torch.device, how: str) -> Choice:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not interpreted:
        return Choice(None, f"runs on cuda (or with TRITON_INTERPRET=1), not on {device.type}")
    try:
        module = importlib.import_module("ultramem_ds.kernels.triton")
    except ImportError as error:
        return Choice(None, f"triton cannot be imported: {error}")
    reason = f"Triton kernels, {how}{', interpreted' if interpreted else ''}"
    return Choice(getattr(module, class_name)(), reason)


_FACTORIES: dict[str, Callable[[torch.device], Choice]] = {
    "triton": _triton,
    "triton-atomic": _triton_atomic,
    "cpu": _cpu,
    "embedding-bag": _embedding_bag,
    "reference": _reference,
}
NAMES = tuple(_FACTORIES)
# What kernel="auto" tries, in this order.
_PREFERENCE = {
    "meta": ("reference",),  # shapes only: nothing whose size the data decide
    "cpu": ("cpu", "embedding-bag", "reference"),
    "cuda": ("triton", "embedding-bag", "reference"),
}


@cache
def _choice(name: str, device_type: str) -> Choice:
    return _FACTORIES[name](torch.device(device_type))


@cache
def _pick(requested: str, device_type: str) -> tuple[str, Choice]:
    """Return the name picked and its choice, whose kernel is not None."""
    preferred = _PREFERENCE.get(device_type, ("embedding-bag", "reference"))
    if requested != "auto" and requested not in _FACTORIES:
        raise ValueError(
            f"no such kernel: {requested} (from memory.kernel or {ENVIRONMENT_KEY}); use auto "
            f"(or, where they run, one of {', '.join(NAMES)})"
        )
    for candidate in preferred if requested == "auto" else (requested,):
        choice = _choice(candidate, device_type)
        if choice.kernel is not None:
            return candidate, choice
    raise ValueError(f"kernel {requested}: {_choice(requested, device_type).reason}")


def resolve(name: str, device: torch.device) -> Kernel:
    """Return the implementation called ``name`` for tables on ``device``.

    Args:
        name: ``auto`` or one of :data:`NAMES`; ``ULTRAMEM_KERNEL`` wins over it.
        device: where the table lives.

    Raises:
        ValueError: the name is unknown, or that implementation cannot run here (says why).
    """
    kernel = _pick(os.environ.get(ENVIRONMENT_KEY) or name, device.type)[1].kernel
    assert kernel is not None
    return kernel


def describe(name: str = "auto", device: torch.device | str = "cpu") -> str:
    """Say which kernel ``name`` gives on ``device``, why, and why the others were passed over.

    Raises:
        ValueError: as :func:`resolve`.
    """
    device_type = torch.device(device).type
    picked, choice = _pick(os.environ.get(ENVIRONMENT_KEY) or name, device_type)
    forced = f" (forced by {ENVIRONMENT_KEY})" if os.environ.get(ENVIRONMENT_KEY) else ""
    passed_over = [
        f"{other}: {_choice(other, device_type).reason}"
        for other in NAMES
        if _choice(other, device_type).kernel is None
    ]
    line = f"kernel {picked}{forced}: {choice.reason}"
    return line + (f"; unavailable: {'; '.join(passed_over)}" if passed_over else "")
