"""A rank of a slow machine: every micro-batch takes longer there."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

from shoal.mesh import Seat
from shoal.training.objective import Objective
from tests.training import cases


def ledger(seat: Seat, victim: int, seconds: float, **args: Any) -> list[list[int]]:
    """This rank's samples of each step of a run in which the victim sleeps so long for each sequence."""
    real = Objective.__call__

    def slow(self: Objective, module: Any, batch: Any, hidden: Any = None) -> Any:
        time.sleep(seconds * len(batch.sample_B))
        return real(self, module, batch, hidden)

    if seat.member != victim:
        return cases.ledger(seat, **args)
    with mock.patch.object(Objective, "__call__", slow):
        return cases.ledger(seat, **args)
