"""Tensors and other memory as the bytes that travel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Buffer = bytes | bytearray | memoryview | Tensor


def in_host_memory(tensor: Tensor) -> Tensor:
    """Pinned memory for a tensor of another device, through which its bytes go: a CPU cannot send or receive its own.

    torch keeps freed pinned memory for the next one of that size. Two GPUs have better ways to reach each other.
    """
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


def size(buffer: Buffer) -> int:
    """In bytes."""
    return buffer.nbytes if isinstance(buffer, Tensor | memoryview) else len(buffer)


def to_send(buffer: Buffer) -> memoryview:
    """The bytes of a buffer; of a contiguous tensor on the CPU without a copy, of one elsewhere after a copy."""
    if isinstance(buffer, Tensor) and buffer.device.type != "cpu":
        return to_send(in_host_memory(buffer).copy_(buffer))
    return _bytes(buffer)


def to_fill(buffer: Buffer) -> tuple[memoryview, Callable[[], object] | None]:
    """(the bytes to receive into, what is to be called when they are there: a tensor elsewhere still needs them)."""
    if isinstance(buffer, Tensor) and buffer.device.type != "cpu":
        host = in_host_memory(buffer)
        return _bytes(host), partial(buffer.copy_, host)
    view = _bytes(buffer)
    assert not view.readonly, "cannot receive into memory that is read-only"
    return view, None


def _bytes(buffer: Buffer) -> memoryview:
    if not isinstance(buffer, Tensor):
        return memoryview(buffer).cast("B")
    assert buffer.is_contiguous(), f"a tensor of shape {tuple(buffer.shape)} is not contiguous"
    # Flat first: a tensor without dimensions has no last one to be seen as bytes.
    return memoryview(buffer.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
