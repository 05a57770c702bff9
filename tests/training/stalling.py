"""A worker that stops in the middle of step 14, for a test that kills it there."""

from __future__ import annotations

import time
from typing import Any

from shoal.mesh import Seat
from shoal.training import worker
from shoal.training.loop import Loop
from tests.training.cases import around_steps


def main(seat: Seat, **args: Any) -> Any:
    def stall(run: Loop) -> None:
        if run.step == 13:
            time.sleep(300)

    with around_steps(stall, lambda _: None):
        return worker.main(seat, **args)
