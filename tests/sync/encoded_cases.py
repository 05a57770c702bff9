"""Ranks that sum what travels encoded, and the same in one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.observe.traffic import traffic
from shoal.sync.codec import codec_of
from shoal.sync.encoded import EncodedSum
from shoal.training.parts import assemble
from tests.equivalence import cases

SIZES = (1, 7, 1000, 4099)


def values(rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in SIZES]


def sums(seat: meshes.Seat, codec: str, dtype: str) -> list[list[float]]:
    """Of each tensor, twice in a row: what was summed first must not be in the way."""
    mesh = meshes.build(Layout(replicas=seat.world), seat, timeout=60)
    try:
        summing = EncodedSum(codec_of(codec))
        for _ in range(2):
            tensors = values(seat.member, getattr(torch, dtype))
            for tensor in tensors:
                summing.start(tensor, mesh.across_replicas)
            summing.finish(mesh.across_replicas, mesh.wait)
        return [tensor.tolist() for tensor in tensors]
    finally:
        mesh.close()


def bytes_of_a_sum(seat: meshes.Seat, codec: str, size: int) -> tuple[int, int]:
    """(sent, received) by this rank's sockets for one sum of `size` float32 numbers."""
    mesh = meshes.build(Layout(replicas=seat.world), seat, timeout=60)
    try:
        summing, group = EncodedSum(codec_of(codec)), mesh.across_replicas
        for numbers in (seat.world, size):  # the first one opens connections
            mesh.largest(0.0)
            before = traffic()
            summing.start(torch.ones(numbers), group)
            summing.finish(group, mesh.wait)
            mesh.largest(0.0)  # everything has arrived, and that it has
            after = traffic()
        assert before is not None
        assert after is not None
        return after.sent - before.sent, after.received - before.received
    finally:
        mesh.close()


def train(seat: meshes.Seat, codec: str, feedback: bool, **options: Any) -> dict[str, Any]:
    """As `tests.equivalence.cases:run`, with a codec."""
    torch.set_num_threads(1)
    steps = options.pop("steps")
    what = cases.job(options.pop("layout"), steps, **options)
    what = replace(what, sync=replace(what.sync, codec=codec, feedback=feedback)).validate()
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        return cases.take_steps(assemble(what, mesh), steps)
    finally:
        mesh.close()
