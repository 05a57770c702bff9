"""What a rank and its helper say to each other (lines of JSON), and the helpers of several ranks (files)."""

from __future__ import annotations

from typing import Any

import msgspec

from shoal.checkpoint.folders import Attempt
from shoal.checkpoint.manifest import File, Tensor


class Order(msgspec.Struct, frozen=True):
    """Write the first `size` bytes of the shared memory as this rank's file of one checkpoint.

    tensors: what this rank knows of, with the pieces that are in its file.
    timeout: seconds without any new part after which rank 0 gives up.
    """

    root: str
    step: int
    rank: int
    world: int
    keep: int
    attempt: Attempt
    timeout: float
    size: int
    tensors: dict[str, Tensor]
    values: dict[str, Any]


class Report(msgspec.Struct, frozen=True):
    """The helper's answer. error: why nothing was saved, or empty. seconds: from order to answer."""

    seconds: float
    error: str = ""


class Part(msgspec.Struct, frozen=True):
    """What one rank wrote, for rank 0's helper. file: None if it had nothing to. error: why it could not."""

    tensors: dict[str, Tensor]
    file: File | None = None
    error: str = ""


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def part_name(rank: int) -> str:
    return f"rank-{rank:05d}.part"
