"""Ranks whose gradients go through codecs that lose much, with and without error feedback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.parallel.flat import Flat
from shoal.sync import AllReduce
from shoal.sync.codec import Codec
from shoal.sync.encoded import EncodedSum
from shoal.sync.lowrank import LowRank
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases

STEPS = 4


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
def running(
    seat: meshes.Seat,
    layout: str,
    steps: int,
    feedback: bool = True,
    codec: Codec | LowRank | None = None,
    **options: Any,
) -> Iterator[Parts]:
    """The job of `tests.equivalence.cases`, its gradients through `Coarse` or another codec."""
    torch.set_num_threads(1)
    what = cases.job(layout, steps, **options)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts = assemble(what, mesh)
        parts.sync = AllReduce(mesh, what.optim.clip, codec or Coarse(), feedback)
        parts.sync.attach(parts.replica, parts.update)
        yield parts
    finally:
        mesh.close()


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


class Signs:
    """One sign a number, and the mean of a row's sizes: of what is 0 something arrives, also where a row is padded."""

    granule = 1

    def __init__(self) -> None:
        self.encoded = 0

    def encode(self, values_RN: Tensor) -> Tensor:
        self.encoded += 1
        scale_R1 = values_RN.abs().mean(1, keepdim=True, dtype=torch.float64)
        return torch.cat([scale_R1.view(torch.uint8), (values_RN < 0).to(torch.uint8)], 1)

    def decode(self, payload_RB: Tensor, dtype: torch.dtype) -> Tensor:
        scale_R1 = payload_RB[:, :8].flatten().view(torch.float64).to(dtype)[:, None]
        return torch.where(payload_RB[:, 8:] > 0, -scale_R1, scale_R1)


def place_of(numbers: int) -> Flat:
    return Flat([(torch.nn.Parameter(torch.empty(numbers, dtype=torch.float64)), numbers, numbers)])


def given(rank: int, step: int, size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * rank + step), dtype=torch.float64)


def sums(seat: meshes.Seat, sizes: list[int], steps: int, rejected: list[int]) -> dict[str, Any]:
    """What arrives in each step of tensors of these sizes that go through `Signs`, the residuals at the end, and how
    often something was encoded."""
    mesh = meshes.build(Layout(replicas=seat.world), seat, timeout=60)
    try:
        codec = Signs()
        summing, group, arrived = EncodedSum(codec, feedback=True), mesh.across_replicas, []
        places = [place_of(size) for size in sizes]
        for step in range(steps):
            tensors = [given(seat.member, step, size) for size in sizes]
            for tensor, place in zip(tensors, places, strict=True):
                summing.start(tensor, group, place)
            summing.finish(group, mesh.wait)
            summing.settle(applied=step not in rejected)
            arrived.append([tensor.tolist() for tensor in tensors])
        feedback = summing.feedback
        assert feedback is not None
        own = [feedback.own.kept[place].numbers_N.tolist() for place in places]
        chunks = [(first, chunk_N.tolist()) for first, chunk_N in map(feedback.sums.kept.__getitem__, places)]
        return {"arrived": arrived, "own": own, "sums": chunks, "encoded": codec.encoded}
    finally:
        mesh.close()


def descend(seat: meshes.Seat, steps: int, feedback: bool) -> float:
    """How far from the minimum of the sum of all ranks' quadratics gradient descent ends, relative to the beginning."""
    mesh = meshes.build(Layout(replicas=seat.world), seat, timeout=60)
    try:
        size = 40
        minima_WN = torch.stack([10 * given(rank, 0, size) for rank in range(seat.world)])
        bent_WN = torch.stack([given(rank, 1, size).abs() + 0.1 for rank in range(seat.world)])
        least_N = (bent_WN * minima_WN).sum(0) / bent_WN.sum(0)
        summing, place, group = EncodedSum(Signs(), feedback), place_of(size), mesh.across_replicas
        x_N = torch.zeros(size, dtype=torch.float64)
        for step in range(steps):
            gradient_N = bent_WN[seat.member] * (x_N - minima_WN[seat.member])
            summing.start(gradient_N, group, place)
            summing.finish(group, mesh.wait)
            summing.settle(applied=True)
            x_N -= 0.05 / (1 + step / 20) * gradient_N
        return ((x_N - least_N).norm() / least_N.norm()).item()
    finally:
        mesh.close()


def disturbed(seat: meshes.Seat, layout: str, what: str, at: int, **options: Any) -> dict[str, Any]:
    """Training in which step `at` has a loss (of one rank) or a gradient (one number of it) that is not finite, or is
    left out; the residuals around it, and this rank's weights at the end."""
    around = []
    with running(seat, layout, STEPS, **options) as parts:
        for step in range(STEPS):
            if step == at and what == "left out":
                continue
            broken = step == at and seat.member == 1
            if broken and what == "gradient":
                parameter = next(parts.replica.module.parameters())
                hook = parameter.register_hook(lambda g: g.index_put((torch.tensor(0),), g.new_tensor(torch.inf)))
            before = _kept(parts)
            parts.sync.begin(step)
            tally = parts.replica.gradients(cases.rank_batches(parts.mesh, step, 0), parts.objective)
            if broken and what == "gradient":
                hook.remove()
            elif broken:
                tally.loss_sum *= torch.nan
            assert parts.sync.end(tally).applied == (step != at)
            if step == at:
                around = [before, _kept(parts)]
        return {"around": around, "weights": [s.local.tolist() for s in parts.replica.held()]}


def _kept(parts: Parts) -> list[Any]:
    """The residuals, which is not all of the state."""
    return [s.local.tolist() for s in parts.sync.state().shards if s.name.startswith("residual")]
