"""Ranks that save and load in different layouts, and the comparison of what they hold with what was to be saved."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal import checkpoint
from shoal import job as jobs
from shoal import mesh as meshes
from shoal.checkpoint import Saver
from shoal.job import Job
from shoal.shard import Shard, State
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases

# One is taken before a checkpoint, the others after it is loaded.
STEPS = 3

Piece = tuple[str, list[int], list[int]]
"""(name, offsets, shape)."""


# With two moments where there are few tensors; with other state for matrices than for the rest.
OPTIMIZERS = {"even": "adamw", "few experts": "sgd", "borders": "muon"}


def job(layout: str, model: str) -> Job:
    return cases.job(layout, STEPS, OPTIMIZERS[model], model=model)


@contextmanager
def _parts(seat: meshes.Seat, layout: str, model: str, number: int = 0) -> Iterator[Parts]:
    """number: of the layout among those of one run."""
    torch.set_num_threads(1)
    what = job(layout, model)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, meshes.View(number, tuple(range(seat.world))), timeout=60)
    try:
        yield assemble(what, mesh)
    finally:
        mesh.close()


def _state(parts: Parts) -> State:
    return State([*parts.replica.held(), *parts.update.state()], {"update": parts.update.values()})


def save_all(seat: meshes.Seat, model: str, root: str, known_in: list[str], trained_in: list[str]) -> None:
    """Checkpoints 1, 2, …: in some layouts with every tensor's `known` values, then in some after a first step.

    All by one saver: most of what a checkpoint costs here is the start of its helper.
    """
    count = len(known_in) + len(trained_in)
    with Saver(Path(root) / "checkpoints", seat.member, seat.world, count, nonce="one") as saver:
        for number, layout in enumerate([*known_in, *trained_in], 1):
            with _parts(seat, layout, model, number) as parts:
                if number > len(known_in):
                    cases.take_steps(parts, 1)
                else:
                    parts.update.restore({"updates": 1})  # before the first one, what has no state is not saved
                    for shard in _state(parts).shards:
                        shard.local.copy_(known(shard))
                pending = saver.save(_state(parts), number)
                pending.wait()
                assert pending.error is None, pending.error
    if seat.member == 0:
        (Path(root) / "job.toml").write_text(jobs.write(job(f"replicas={seat.world}", model)))


def load_known(seat: meshes.Seat, layout: str, model: str, folders: list[str]) -> tuple[list[str], list[Piece]]:
    """(what was not loaded as it is known, what this rank holds)."""
    wrong = []
    with _parts(seat, layout, model) as parts:
        shards = _state(parts).shards
        for folder in folders:
            for shard in shards:
                shard.local.fill_(float("nan"))
            checkpoint.load(Path(folder), shards)
            wrong += [f"{s.name} from {folder}" for s in shards if not torch.equal(s.local, known(s))]
        return wrong, [(s.name, list(s.offsets), list(s.local.shape)) for s in shards]


def known(shard: Shard) -> Tensor:
    """What a piece holds of numbers that tell tensors and places apart, and that float32 holds exactly."""
    first = zlib.crc32(shard.name.encode()) % 1_000_003
    whole = torch.arange(first, first + prod(shard.global_shape)).view(shard.global_shape)
    return whole[cases.place(list(shard.offsets), shard.local)].to(shard.local.dtype)


def go_on(seat: meshes.Seat, layout: str, model: str, folder: str) -> dict[str, Any]:
    """The steps after the first, from what another layout saved."""
    with _parts(seat, layout, model) as parts:
        state = _state(parts)
        for shard in state.shards:
            shard.local.fill_(float("nan"))
        parts.update.restore(checkpoint.load(Path(folder), state.shards)["update"])
        return cases.take_steps(parts, STEPS, first=1)


def assert_all_held(folder: str, pieces: list[Piece]) -> None:
    """The ranks together hold every element of every saved tensor, and nothing else."""
    tensors = checkpoint.manifest.read(Path(folder)).tensors
    seen = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in tensors.items()}
    for name, offsets, shape in pieces:
        seen[name][cases.place(offsets, torch.empty(shape))] = True
    assert all(mask.all() for mask in seen.values())
