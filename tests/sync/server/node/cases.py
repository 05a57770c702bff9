"""What ranks do in the tests of this folder."""

from __future__ import annotations

from pathlib import Path

from shoal import mesh
from shoal.job import Layout
from shoal.mesh import Seat
from shoal.sync.server.node.book import own_token


def token(seat: Seat, folder: str) -> str:
    """The token of the run in this folder, for which all ranks ask at once."""
    with mesh.build(Layout(replicas=seat.world), seat, timeout=60) as ranks:
        ranks.largest(0.0)
        return own_token(Path(folder))
