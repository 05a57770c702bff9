"""One description of a piece of a tensor, shared by sync, checkpoint, optim, recovery and serving."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Shard:
    """The part of one logical tensor that this rank holds.

    name: canonical (Hugging Face) name; optimizer state is `<slot>.<name>`, e.g. `exp_avg.lm_head.weight`.
    global_shape: of the whole tensor. offsets: where `local` starts in it, one integer a dimension.
    local: the values held here, any dtype; may be empty (zero rows) where the rank holds nothing.
    grad: gradient of `local`, or None. owner: False where another rank is the one that saves the same piece.
    counted: False where another rank of the same replica, or another stage of this rank, holds the same piece and
    counts it in the gradient's norm.
    """

    name: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    local: torch.Tensor
    grad: torch.Tensor | None = None
    owner: bool = True
    counted: bool = True

    @property
    def whole(self) -> bool:
        return tuple(self.local.shape) == self.global_shape


@dataclass
class State:
    """All that a checkpoint holds: tensors as shards, everything else as JSON values."""

    shards: list[Shard]
    values: dict[str, Any] = field(default_factory=dict)
