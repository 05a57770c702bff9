"""A worker that has not come to its first step; for a test that interrupts it."""

from __future__ import annotations

import time
from pathlib import Path

from shoal.mesh import Seat


def main(seat: Seat, *, folder: str, **_: object) -> None:
    if seat.member == 0:
        (Path(folder) / "waiting").touch()
    time.sleep(300)
