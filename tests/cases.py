"""What ranks do in the tests of benchmarks."""

from __future__ import annotations

import itertools
import os

from benchmarks import turns

from shoal.mesh import Seat


def take_turns(seat: Seat, contender: str, folder: str, fails: bool = False) -> str:
    """Says 1, 2, … as its seconds."""
    if fails and seat.member == 1:
        os._exit(3)
    count = itertools.count(1)
    turns.take_turns(folder, contender, seat.member, lambda: float(next(count)))
    return contender
