"""Memory that has been received into, kept for the next tensor of as many bytes: new memory costs a page fault a page.

Nothing comes back by itself. Whoever has read what came, and has kept no view of it, gives it back; what is not given
back is freed when nobody has it any more, as any tensor is.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

# Smaller tensors come from memory that the allocator has at hand.
_LEAST = 1 << 16


class Pool:
    """Called by several threads. most: bytes that are kept; beyond them, what comes back is freed."""

    def __init__(self, most: int = 1 << 28):
        self.most = most
        self._free: dict[int, list[Tensor]] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Of this shape, contiguous, with any numbers in it."""
        size = math.prod(shape) * dtype.itemsize
        with self._lock:
            kept = self._free.get(size)
            if not kept:
                return torch.empty(tuple(shape), dtype=dtype)
            self._bytes -= size
            return kept.pop().view(dtype).view(tuple(shape))

    def give(self, tensors: Iterable[Tensor]) -> None:
        """Takes back what `take` gave, and nothing else: from now on anything may be written there."""
        with self._lock:
            for tensor in tensors:
                if tensor.nbytes >= _LEAST and self._bytes + tensor.nbytes <= self.most:
                    self._bytes += tensor.nbytes
                    self._free.setdefault(tensor.nbytes, []).append(tensor.detach().view(-1).view(torch.uint8))
