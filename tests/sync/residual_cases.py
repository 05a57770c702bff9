"""Ranks that save residuals and go on from them, in the same layout and in others."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from shoal import checkpoint
from shoal import mesh as meshes
from shoal.checkpoint import Saver, manifest
from shoal.parallel.flat import Flat
from shoal.shard import Shard, State
from shoal.sync import AllReduce
from shoal.sync.lowrank import LowRank
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases
from tests.sync.feedback_cases import Signs, running

CODECS = {"signs": Signs, "lowrank": partial(LowRank, 2, seed=5)}

# After so many a checkpoint is written; and all.
SAVED, STEPS = 3, 5


def train(seat: meshes.Seat, layout: str, root: str, codec: str = "signs", **options: Any) -> dict[str, Any]:
    """All steps, with a checkpoint on the way; this rank's weights, and its residuals as they were saved. codec: of
    `CODECS`."""
    with (
        running(seat, layout, STEPS, codec=CODECS[codec](), **options) as parts,
        Saver(Path(root), seat.member, seat.world, 1, nonce="one") as saver,
    ):
        before = residuals(parts)
        cases.take_steps(parts, SAVED)
        state = State(parts.sync.state().shards, {"update": parts.update.values()})
        pending = saver.save(state, SAVED)
        saved = residuals(parts)
        pending.wait()
        assert pending.error is None, pending.error
        return {"before": before, "saved": saved, "known": directions(parts)} | cases.take_steps(
            parts, STEPS, first=SAVED
        )


def go_on(seat: meshes.Seat, layout: str, folder: str, codec: str = "signs", **options: Any) -> dict[str, Any]:
    """The steps that were left; and the residuals with which they began."""
    with running(seat, layout, STEPS, codec=CODECS[codec](), **options) as parts:
        load(parts, folder)
        return {"loaded": residuals(parts), "known": directions(parts)} | cases.take_steps(parts, STEPS, first=SAVED)


def only_load(seat: meshes.Seat, layout: str, folders: list[str], codec: str = "signs", **options: Any) -> list[Any]:
    """The residuals after each checkpoint."""
    with running(seat, layout, STEPS, codec=CODECS[codec](), **options) as parts:
        found = []
        for folder in folders:
            parts.sync = AllReduce(parts.mesh, 0.0, CODECS[codec]())
            parts.sync.attach(parts.replica, parts.update)
            load(parts, folder)
            found.append(residuals(parts))
        return found


def load(parts: Parts, folder: str) -> None:
    parts.sync.restore(checkpoint.load(Path(folder), parts.sync.wanted(manifest.read(Path(folder)))))


def residuals(parts: Parts) -> list[tuple[str, tuple[int, ...], list[Any]]]:
    """(name, offsets, numbers) of all that this rank saves of them."""
    return [(s.name, s.offsets, s.local.tolist()) for s in kept(parts)]


def directions(parts: Parts) -> list[tuple[str, tuple[int, ...], list[Any]]]:
    """The same of PowerSGD's, and of whoever saves them."""
    found = [shard for shard in parts.sync.state().shards if shard.name.startswith("lowrank-q")]
    return [(s.name, s.offsets, s.local.tolist()) for s in found]


def kept(parts: Parts) -> list[Shard]:
    """Of the state, what is residual."""
    return [shard for shard in parts.sync.state().shards if shard.name.startswith("residual")]


def totals(results: list[list[Any]], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of each parameter the sum of all ranks' residuals."""
    out = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    for name, offsets, numbers in chain.from_iterable(results):
        if not numbers:
            continue  # of a rank without rows
        piece = torch.tensor(numbers, dtype=torch.float64)
        out[name.partition(".")[2]][cases.place(offsets, piece)] += piece
    return out


def pay(seat: meshes.Seat, layout: str, folder: str, **options: Any) -> list[Any]:
    """Without a codec: by how much the first summed gradient after the checkpoint differs from that of one without
    residuals, and what is still to be added before it and after it."""
    torch.set_num_threads(1)
    what = cases.job(layout, STEPS, clip=0.0, **options)
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts, left, gradients = assemble(what, mesh), [], []
        found = manifest.read(Path(folder))
        names = [name for name in found.tensors if not name.startswith("residual")]
        without = msgspec.structs.replace(found, tensors={name: found.tensors[name] for name in names})
        for saved in (without, found):
            parts.sync.restore(checkpoint.load(Path(folder), parts.sync.wanted(saved)))
            left.append(residuals(parts))
            parts.sync.begin(SAVED)
            tally = parts.replica.gradients(cases.rank_batches(mesh, SAVED, 0), parts.objective)
            weight = parts.sync.end(tally).weight
            gradients.append([shard.grad * weight for shard in parts.replica.shards()])
        left.append(residuals(parts))
        more = [
            told("more", replace(s, local=two - one))
            for s, one, two in zip(parts.replica.shards(), *gradients, strict=True)
            if s.counted and mesh.replica == 0
        ]
        return [*left, more]
    finally:
        mesh.close()


def keep_books(seat: meshes.Seat, layout: str, codec: str = "signs", **options: Any) -> tuple[list[Any], list[Any]]:
    """This rank's part of all gradients before they were sent; and of all that was applied, with its residuals."""
    with running(seat, layout, STEPS, codec=CODECS[codec](), clip=0.0, **options) as parts:
        sent: dict[Flat, Tensor] = {}
        applied: dict[int, Tensor] = {}

        def send(flat: Tensor, place: Flat) -> None:
            sent[place] = sent.get(place, 0) + flat
            parts.sync._send(flat, place)

        replica = parts.replica
        replica.on_bucket(send)
        for step in range(STEPS):
            parts.sync.begin(step)
            done = parts.sync.end(replica.gradients(cases.rank_batches(parts.mesh, step, 0), parts.objective))
            for index, shard in enumerate(replica.shards()):
                applied[index] = applied.get(index, 0) + shard.grad * done.weight
        given = [told("sent", s) for place, flat in sent.items() for _, s in replica.lying_in(place, flat)]
        counted = [(i, s) for i, s in enumerate(replica.shards()) if s.counted and parts.mesh.replica == 0]
        arrived = [told("applied", replace(s, local=applied[i])) for i, s in counted]
        return given, arrived + residuals(parts)


def told(slot: str, shard: Shard) -> tuple[str, tuple[int, ...], list[Any]]:
    return f"{slot}.{shard.name}", shard.offsets, shard.local.tolist()
