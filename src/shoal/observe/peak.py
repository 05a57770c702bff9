"""How many operations per second a device reaches in matrix products: what MFU is measured against."""

from __future__ import annotations

import time

import torch

from shoal import device

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}

# Square sizes: below the first a call costs more than its arithmetic, the last saturates any device we know.
_SMALLEST, _LARGEST = 256, 8192


def matmul_peak(where: torch.device, precision: str, budget: float = 0.3) -> float:
    """FLOP/s of the best matrix product in `budget` seconds, with the threads that this process has.

    Sizes double as long as the next one fits into the time that is left. Ranks that share a machine should
    call it at the same moment: each then feels the load of its neighbours, as in training.
    """
    deadline = time.perf_counter() + budget
    random = torch.Generator(where).manual_seed(0)  # the process's own generator stays as it was
    best, size = 0.0, _SMALLEST
    while True:
        # Random values: GPUs multiply zeros at less power, and so faster than they will in training.
        a, b = (torch.randn(size, size, generator=random, device=where, dtype=DTYPES[precision]) for _ in range(2))
        seconds = min(_once(a, b, where) for _ in range(3))
        best = max(best, 2 * size**3 / seconds)
        # Making the next matrices and its first call, which may compile, cost about as much as a product.
        if size == _LARGEST or time.perf_counter() + 4 * 8 * seconds > deadline:
            break
        size *= 2
    while time.perf_counter() + seconds < deadline:
        seconds = _once(a, b, where)
        best = max(best, 2 * size**3 / seconds)
    return best


def _once(a: torch.Tensor, b: torch.Tensor, where: torch.device) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    device.synchronize(where)
    return time.perf_counter() - start
