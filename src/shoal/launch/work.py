"""A rank of `shoal train`: training, with what this layer knows of the machine."""

from __future__ import annotations

from typing import Any

from shoal.launch import predicted
from shoal.mesh import Seat
from shoal.training import worker


def main(seat: Seat, **arguments: Any) -> dict[str, Any]:
    """As `worker.main`."""
    return worker.main(seat, predict=predicted.of_run, **arguments)
