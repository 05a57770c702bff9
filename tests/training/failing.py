"""A worker whose rank 1 raises in the middle of training."""

from __future__ import annotations

from typing import Any

from shoal.mesh import Seat
from shoal.training import worker
from shoal.training.loop import Loop
from tests.training.cases import around_steps


def main(seat: Seat, **args: Any) -> Any:
    def fail(run: Loop) -> None:
        if seat.member == 1 and run.step == 5:
            raise ValueError("the cat has sat on the keyboard")

    with around_steps(fail, lambda _: None):
        return worker.main(seat, **args)
