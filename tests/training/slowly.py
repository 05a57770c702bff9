"""A worker that takes its time before each gradient, so that a run can save every version."""

from __future__ import annotations

import time
from typing import Any

from shoal.mesh import Seat
from shoal.training.server import work as worker

# Seconds before each gradient.
PAUSE = 0.5


def work(seat: Seat, **args: Any) -> dict[str, Any]:
    """As `shoal.training.server.work.main`."""
    batches = worker._batches

    def late(*those: Any) -> Any:
        time.sleep(PAUSE)
        return batches(*those)

    worker._batches = late
    return worker.main(seat, **args)
