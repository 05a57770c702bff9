"""Ranks that sum given gradients as products of thin matrices, and the same by hand in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.observe.traffic import traffic
from shoal.parallel.pieces import Part
from shoal.parallel.replica import Replica
from shoal.sync import lowrank
from shoal.sync.feedback import Residuals
from shoal.sync.lowrank import LowRank, LowRankSum

SHAPES = {"wide": (20, 50), "tall": (70, 9), "norm": (13,), "thin": (3, 40), "cube": (12, 4, 5), "one": ()}
"""With rank 3, `thin` goes as it is, as what is no matrix does."""

MATRICES = ("wide", "tall", "cube")


def given(rank: int, step: int, kind: str) -> dict[str, Tensor]:
    """A replica's gradients, float64. kind: `full` rank; `low`, of which all replicas' sum has rank 3, another one each
    step; `same` in each step; `gone`, as low, but none in step 1, and never in the first three rows."""
    if kind == "gone" and step == 1:
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    at = 0 if kind == "same" else step
    out = {}
    for name, shape in SHAPES.items():
        own = torch.Generator().manual_seed(1000 * rank + at)
        out[name] = torch.randn(shape, generator=own, dtype=torch.float64)
        if kind in ("low", "gone") and len(shape) > 1:
            common = torch.randn(shape[0], 3, generator=torch.Generator().manual_seed(at + 7), dtype=torch.float64)
            if kind == "gone":
                common[:3] = 0
            out[name] = (common @ out[name].flatten(1)[:3]).view(shape)
    return out


class Given(nn.Module):
    """Parameters whose gradients are what the batch says."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        products = [(p * batch[name].to(p.dtype)).sum() for name, p in self.named_parameters()]
        return torch.stack(products).sum()


@contextmanager
def summing(
    seat: meshes.Seat, how: LowRank, feedback: bool, dtype: str, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> Iterator[tuple[Replica, LowRankSum]]:
    torch.set_num_threads(1)
    mesh = meshes.build(Layout(replicas=seat.world), seat, timeout=60)
    try:
        module = Given(shapes, getattr(torch, dtype))
        replica: Replica = Replica({0: Part(module, [])}, mesh, bucket_bytes=9000)  # several buckets
        sums = LowRankSum(how, feedback, replica)
        replica.on_bucket(lambda flat, place: sums.start(flat, mesh.across_replicas, place))
        yield replica, sums
    finally:
        mesh.close()


def step(replica: Replica, sums: LowRankSum, batch: dict[str, Tensor], applied: bool = True) -> dict[str, Tensor]:
    """What arrives."""
    one = torch.ones((), dtype=torch.float64)
    replica.gradients([batch], lambda module, batch, _: (module(batch), one))
    sums.finish(replica.mesh.across_replicas, replica.mesh.wait)
    sums.settle(applied)
    return {shard.name: shard.grad.clone() for shard in replica.collect()}


def run(
    seat: meshes.Seat, kind: str, steps: int, rank: int = 3, feedback: bool = True, dtype: str = "float64",
    broken: int = -1, bug: str = "",
) -> dict[str, Any]:  # fmt: skip
    """What arrives in each step; the directions before the first one and after the last one, and residuals then.

    broken: a step in which one number of rank 1's is NaN, and which is not applied. bug: planted in all ranks."""
    with _planted(bug), summing(seat, LowRank(rank, seed=4), feedback, dtype) as (replica, sums):
        first = _told(sums.common(replica))
        arrived = []
        for index in range(steps):
            batch = given(seat.member, index, kind)
            if index == broken and seat.member == 1:
                batch["wide"][4, 7] = torch.nan
            arrived.append({n: t.tolist() for n, t in step(replica, sums, batch, index != broken).items()})
        last, state = _told(sums.common(replica)), _told(sums.state(replica))
        residuals = {name.partition(".")[2]: told for name, told in state.items() if name not in last}
        return {"first": first, "arrived": arrived, "last": last, "residuals": residuals}


def _told(shards: list[Any]) -> dict[str, Any]:
    return {shard.name: shard.local.tolist() for shard in shards}


def _planted(bug: str) -> Any:
    """cold: every step begins from the first directions. unsummed: each replica goes by its own right factors. lost:
    residuals are zero. stuck: directions may be zero."""
    summed, lose = lowrank._all_reduce, Residuals.lose

    def left_only(numbers_n: Tensor, group: Any) -> Any:
        left_only.calls += 1
        # Two buckets, each of which sends left factors first.
        return None if left_only.calls % 4 in (3, 0) else summed(numbers_n, group)

    left_only.calls = 0
    return {
        "": nullcontext,
        "cold": lambda: mock.patch.object(lowrank, "directions", lambda right_MR, before_MR: before_MR),
        "unsummed": lambda: mock.patch.object(lowrank, "_all_reduce", left_only),
        "stuck": lambda: mock.patch.object(lowrank, "directions", lambda right_MR, before_MR: right_MR),
        "lost": lambda: mock.patch.object(Residuals, "lose", lambda r, lost_N, place: lose(r, lost_N * 0, place)),
    }[bug]()


def by_hand(world: int, steps: int, first: dict[str, Any], broken: int = -1) -> tuple[list[dict[str, Any]], Any]:
    """Algorithms 1 and 2 of the paper, with sums for means: what arrives in each step, and residuals of each rank."""
    known = {name: np.array(first[f"lowrank-q.{name}"]).reshape(-1, 3) for name in MATRICES}
    lost = [{name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(world)]
    arrived = []
    for index in range(steps):
        sums = {}
        gradients = [given(rank, index, "full") for rank in range(world)]
        for name in () if index == broken else SHAPES:
            sent = [gradients[rank][name].numpy() + lost[rank][name] for rank in range(world)]
            if name not in MATRICES:
                sums[name] = sum(sent)
                continue
            of_ranks = [one.reshape(len(one), -1) for one in sent]
            left = _gram_schmidt(sum(one @ known[name] for one in of_ranks))
            known[name] = sum(one.T @ left for one in of_ranks)
            sums[name] = (left @ known[name].T).reshape(SHAPES[name])
            for rank, one in enumerate(of_ranks):
                lost[rank][name] = (one - left @ (one.T @ left).T).reshape(SHAPES[name])
        arrived.append(sums)
    return arrived, lost


def _gram_schmidt(left: np.ndarray) -> np.ndarray:
    left = left.copy()
    for column in range(left.shape[1]):
        left[:, column] /= np.linalg.norm(left[:, column])
        for other in range(column + 1, left.shape[1]):
            left[:, other] -= left[:, column] @ left[:, other] * left[:, column]
    return left


def bytes_of_a_sum(seat: meshes.Seat, rank: int, rows: int, columns: int, vector: int) -> tuple[int, int]:
    """(sent, received) by this rank's sockets for one sum of a float32 matrix and a vector."""
    shapes = {"matrix": (rows, columns), "vector": (vector,)}
    with summing(seat, LowRank(rank), True, "float32", shapes) as (replica, sums):
        batch = {name: torch.ones(shape) for name, shape in shapes.items()}
        for _ in range(2):  # the first one opens connections
            replica.mesh.largest(0.0)
            before = traffic()
            step(replica, sums, batch)
            replica.mesh.largest(0.0)  # everything has arrived, and that it has
            after = traffic()
        assert before is not None
        assert after is not None
        return after.sent - before.sent, after.received - before.received
