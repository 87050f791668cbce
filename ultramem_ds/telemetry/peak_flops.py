"""Peak FLOP/s of a device: the denominator of model FLOPs utilisation."""

from __future__ import annotations

import os
import time

import torch

ENVIRONMENT = "ULTRAMEM_PEAK_TFLOPS"

# Dense bf16 tensor-core TFLOP/s from vendors' data sheets, by part of the device's name; the first
# match counts.
_BF16_TFLOPS = (
    ("B200", 2250.0),
    ("H200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("A100", 312.0),
    ("L40S", 362.0),
    ("MI300X", 1307.0),
)


def data_sheet_flops_per_s(name: str) -> float | None:
    """Dense bf16 FLOP/s of the GPU that torch calls ``name``, None where it is not known."""
    return next((tflops * 1e12 for part, tflops in _BF16_TFLOPS if part in name), None)


def peak_from_environment() -> float | None:
    """``ULTRAMEM_PEAK_TFLOPS`` in FLOP/s, None where it is not set.

    Raises:
        ValueError: it is no positive number.
    """
    text = os.environ.get(ENVIRONMENT)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{ENVIRONMENT}={text!r} must be a positive number of TFLOP/s")
    return value * 1e12


def peak_flops_per_s(device: torch.device, precision: str) -> tuple[float, str]:
    """Peak FLOP/s of one rank, and where the number is from.

    In this order: ``ULTRAMEM_PEAK_TFLOPS`` (TFLOP/s of one rank), the data sheet of a known GPU
    (bf16), a short matrix product on the device. All ranks measure at the same time, so that
    those of one machine share its cores as in training.

    Raises:
        ValueError: see :func:`peak_from_environment`.
    """
    told = peak_from_environment()
    if told is not None:
        return told, ENVIRONMENT
    if device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(device)
        published = data_sheet_flops_per_s(name)
        if published is not None:
            return published, f"data sheet of {name}"
    return measure_matmul(device, precision), "a measured matrix product"


def measure_matmul(
    device: torch.device, precision: str, size: int | None = None, rounds: int = 5
) -> float:
    """FLOP/s of a square matrix product, the best of ``rounds``; some 50 ms in all."""
    size = size or (8192 if device.type == "cuda" else 512)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.ones(size, size, dtype=dtype, device=device)
    best_s = float("inf")
    for _ in range(rounds + 1):
        _synchronize(device)
        begin = time.perf_counter()
        a @ a
        _synchronize(device)
        best_s = min(best_s, time.perf_counter() - begin)
    return 2 * size**3 / best_s


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
