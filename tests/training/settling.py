"""What ranks do in the tests of `auto`: they settle a job, or count what measuring it computes and keeps."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode

from shoal import mesh as meshes
from shoal.data.batch import Batch
from shoal.job import Job, write
from shoal.mesh import Mesh, Seat
from shoal.parallel.pieces import Part
from shoal.training import measure, settle
from shoal.training.parts import assemble, spread
from tests.equivalence.cases import job as small
from tests.equivalence.cases import rank_batches


@contextlib.contextmanager
def seated(seat: Seat, layout: str, model: str, words: int = 0, **train: Any) -> Iterator[tuple[Job, Mesh]]:
    """words: of the vocabulary, 0 = as many as it has."""
    torch.set_num_threads(1)
    job = small(layout, steps=5, model=model)
    options = replace(job.model, vocab_size=words or job.model.vocab_size)
    job = replace(job, model=options, train=replace(job.train, **train)).validate()
    assert job.layout is not None
    mesh = meshes.build(job.layout, seat, timeout=60)
    try:
        with mock.patch.object(measure, "_REPEATS", 1):
            yield job, mesh
    finally:
        mesh.close()


def settled(
    seat: Seat, layout: str, model: str = "even", chance: int = 0, bug: bool = False, **train: Any
) -> dict[str, Any]:
    """The job that this rank goes on with, and what it said.

    chance: how long anything takes is drawn on each rank by itself, and only the first one has a compiler. bug: each
    goes by what it has measured itself.
    """
    said: list[str] = []
    with contextlib.ExitStack() as patches:
        job, mesh = patches.enter_context(seated(seat, layout, model, **train))
        if chance:
            drawn = random.Random(100 * chance + mesh.rank)
            patches.enter_context(mock.patch.object(measure, "_clock", lambda _, work: (work(), drawn.random())[1]))
            patches.enter_context(mock.patch.object(shutil, "which", return_value=None if mesh.rank else "g++"))
        if bug:
            patches.enter_context(mock.patch.object(Mesh, "largest", lambda self, value: float(value)))
        job = settle.settle(job, mesh, _batches(mesh), said.append)
    return {"job": write(job), "said": said}


def _batches(mesh: Mesh) -> list[Batch]:
    return rank_batches(mesh, 0, 0)


def counted(seat: Seat, layout: str, model: str, words: int = 0) -> dict[str, Any]:
    """Of this rank, floating-point operations of what is measured; bytes of weights then, and in training.

    stage: of the pipeline. tokens: of a micro-batch. operations, bytes: of each piece that this rank measures.
    """
    operations, held = [0], [0]

    def flops(mesh: Mesh, work: Any) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        operations[0] = counter.get_total_flops()
        return float(operations[0])

    real = measure.part_of

    def noted(*args: Any) -> Part:
        part = real(*args)
        held[0] = sum(p.numel() * p.element_size() for p in part.module.parameters())
        return part

    def largest(self: Mesh, value: float) -> float:
        pieces.append((operations[0], held[0]))
        operations[0] = held[0] = 0
        return value

    pieces: list[tuple[int, int]] = []
    with seated(seat, layout, model, words, precision="fp32") as (job, mesh):
        batches = _batches(mesh)
        with mock.patch.object(measure, "_clock", flops), mock.patch.object(measure, "part_of", noted):
            with mock.patch.object(Mesh, "largest", largest):
                names = list(measure.pieces(job, mesh, batches[0]))
            step, _ = measure.step(job, mesh, batches)
        measured, _ = spread(measure.shallow(job), mesh)
        trained = assemble(job, mesh).replica
        weights = [sum(s.local.numel() * s.local.element_size() for s in r.shards()) for r in (measured, trained)]
        return {
            "stage": mesh.stage, "tokens": batches[0].tokens_BL.numel(), "names": names, "step": step,
            "operations": [o for o, _ in pieces], "bytes": [b for _, b in pieces],
            "measured": weights[0], "trained": weights[1],
        }  # fmt: skip
