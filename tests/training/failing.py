"""Workers whose rank 1 raises or is killed in the middle of training."""

from __future__ import annotations

import os
import signal
from typing import Any
from unittest import mock

from shoal.mesh import Seat
from shoal.training import worker
from shoal.training.loop import Loop
from shoal.training.objective import Objective
from tests.training.cases import around_steps


def main(seat: Seat, **args: Any) -> Any:
    def fail(run: Loop) -> None:
        if seat.member == 1 and run.step == 5:
            raise ValueError("the cat has sat on the keyboard")

    with around_steps(fail, lambda _: None):
        return worker.main(seat, **args)


def killed(seat: Seat, **args: Any) -> Any:
    """In a forward pass, so that the others wait for what it would have sent."""
    forward = Objective.__call__
    calls = 0

    def dies(self: Objective, *inputs: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if seat.member == 1 and calls == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, *inputs, **options)

    with mock.patch.object(Objective, "__call__", dies):
        return worker.main(seat, **args)
