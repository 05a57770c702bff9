"""Ranks whose gradients go through codecs that lose much, with and without error feedback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shoal import mesh as meshes
from shoal.parallel.flat import Flat
from shoal.sync import AllReduce
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases


class Coarse:
    """Each number towards zero to a power of 4, wherever it lies in a row: one byte, of sign and exponent.

    What is lost is up to three quarters of a number, and nobody needs to know where buckets and chunks begin to say
    what arrives.
    """

    granule = 1

    def encode(self, values_RN: Tensor) -> Tensor:
        power_RN = (torch.frexp(values_RN).exponent - 1).div(2, rounding_mode="floor")
        code_RN = torch.where(power_RN > -62, power_RN + 62, 0).clamp(max=126)
        code_RN = torch.where(values_RN == 0, 0, code_RN)
        code_RN = torch.where(values_RN.isfinite(), code_RN, 127)
        return (code_RN + 128 * (values_RN < 0)).to(torch.uint8)

    def decode(self, payload_RB: Tensor, dtype: torch.dtype) -> Tensor:
        code_RN = (payload_RB & 127).to(dtype)
        size_RN = torch.where(code_RN == 0, 0, torch.exp2(2 * (code_RN - 62)))
        size_RN = torch.where(code_RN == 127, torch.nan, size_RN)
        return torch.where(payload_RB > 127, -size_RN, size_RN)


@contextmanager
def running(seat: meshes.Seat, layout: str, steps: int, feedback: bool = True, **options: Any) -> Iterator[Parts]:
    """The job of `tests.equivalence.cases`, its gradients through `Coarse`."""
    torch.set_num_threads(1)
    what = cases.job(layout, steps, **options)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        yield coarsely(assemble(what, mesh), feedback)
    finally:
        mesh.close()


def coarsely(parts: Parts, feedback: bool = True) -> Parts:
    parts.sync = AllReduce(parts.mesh, parts.job.optim.clip, Coarse(), feedback)
    parts.sync.attach(parts.replica, parts.update)
    return parts


def train(seat: meshes.Seat, layout: str, steps: int, feedback: bool = True, **options: Any) -> dict[str, Any]:
    with running(seat, layout, steps, feedback, **options) as parts:
        return cases.take_steps(parts, steps)


def misplaced(seat: meshes.Seat, layout: str, **options: Any) -> list[str]:
    """What the descriptions of flat tensors say of this rank's gradients that is not so; empty where all is right."""
    wrong: list[str] = []
    with running(seat, layout, 1, **options) as parts:
        replica, handed = parts.replica, {}
        replica.on_bucket(lambda flat, place: handed.update({place: flat}))
        replica.gradients(cases.rank_batches(parts.mesh, 0, 0), parts.objective)
        if {*handed} != {*replica.flats()}:
            wrong.append("not all flats were handed over")
        # Where in memory the numbers of each piece of the gradient lie.
        actual = {id(s): s.grad.data_ptr() for s in replica.collect() if s.grad.numel()}
        for place, flat in handed.items():
            if flat.numel() != place.size:
                wrong.append(f"{flat.numel()} numbers came where {place.size} lie")
            for piece, shard in replica.lying_in(place, flat):
                same = (shard.name, shard.offsets) == (piece.shard.name, piece.shard.offsets)
                if not same or actual.pop(id(piece.shard), 0) != shard.local.data_ptr():
                    wrong.append(f"{shard.name} at {shard.offsets}")
            wrong += _unlike_in_stretches(parts, place)
        return wrong + [f"{len(actual)} pieces lie nowhere"] * bool(actual)


def _unlike_in_stretches(parts: Parts, place: Flat) -> list[str]:
    """In stretches, the elements of each piece must be the same as in the whole, each once, and the rest gaps."""
    marks_N = torch.arange(1, place.size + 1, dtype=torch.float64)
    seen = {id(p): torch.zeros_like(p.shard.local) for p, _ in parts.replica.lying_in(place, marks_N)}
    size = place.size // 7 + 1
    for first in range(0, place.size, size):
        stretch_n = torch.cat([marks_N[first : first + size], torch.ones(3)])  # it reaches beyond the end at the last
        place.clear_gaps(stretch_n, first)
        for piece, shard in parts.replica.lying_in(place, stretch_n[:size], first):
            inside = [o - p for o, p in zip(shard.offsets, piece.shard.offsets, strict=True)]
            seen[id(piece)][cases.place(inside, shard.local)] += shard.local
            shard.local.zero_()
        if stretch_n[:size].any():
            return [f"numbers in gaps from {first} on"]
    unlike = [s.name for p, s in parts.replica.lying_in(place, marks_N) if not torch.equal(s.local, seen[id(p)])]
    return [f"another {name} in stretches" for name in unlike]
