"""A rank that chooses a codec."""

from __future__ import annotations

from dataclasses import replace

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.sync.choose import CODECS, choose


def chosen(seat: meshes.Seat, numbers: int) -> tuple[str, list[str]]:
    """(codec, what was said)."""
    mesh = meshes.build(Layout(replicas=seat.world), seat, timeout=60)
    try:
        mesh.seat = replace(seat, neighbours=1)
        said: list[str] = []
        return choose(mesh, CODECS, numbers, said.append), said
    finally:
        mesh.close()
