"""What codecs draw at random."""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.ops.counter import draw


class Draws:
    """Random keys of one rank: hashes of (seed, rank, call, row), the same wherever and whenever they are computed.

    rank: any number that is another on every rank, so that their errors are independent and average out.
    """

    calls: int
    """How often keys were asked for, from a number of the step on: so a run that goes on draws what it would have."""

    def __init__(self, seed: int = 0, rank: int = 0):
        self.seed, self.rank, self.calls = seed, rank, 0

    def at(self, step: int) -> None:
        """This step begins."""
        self.calls = step << 20

    def keys(self, rows: int, device: torch.device) -> Tensor:
        """(R,), int64: one key for each row, other ones in each call."""
        state_R = torch.zeros(rows, dtype=torch.int64, device=device)
        for part in (self.seed, self.rank, self.calls, torch.arange(rows, device=device)):
            state_R = draw(state_R, part)
        self.calls += 1
        return state_R
