"""Ranks that save and load in different layouts, and the comparison of what they hold with what is on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shoal import checkpoint
from shoal import mesh as meshes
from shoal.checkpoint import Saver
from shoal.shard import State
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases


def _parts(seat: meshes.Seat, layout: str) -> Parts:
    torch.set_num_threads(1)
    what = cases.job(layout, 2, "adamw", model="even")
    assert what.layout is not None
    return assemble(what, meshes.build(what.layout, seat, timeout=60))


def _state(parts: Parts) -> State:
    return State([*parts.replica.shards(), *parts.update.state()], {"update": parts.update.values()})


def save(seat: meshes.Seat, layout: str, folder: str) -> None:
    parts = _parts(seat, layout)
    try:
        cases.take_steps(parts, 1)
        with Saver(Path(folder), parts.mesh.rank, parts.mesh.world, 1, nonce="one") as saver:
            pending = saver.save(_state(parts), 1)
            pending.wait()
            assert pending.error is None, pending.error
    finally:
        parts.mesh.close()


def load_all(seat: meshes.Seat, layout: str, folders: list[str]) -> list[list[tuple[str, list[int], Any]]]:
    """For each folder, this rank's pieces after loading: (name, offsets, values)."""
    parts = _parts(seat, layout)
    try:
        loaded = []
        for folder in folders:
            state = _state(parts)
            for shard in state.shards:
                shard.local.fill_(float("nan"))
            checkpoint.load(newest(folder), state.shards)
            loaded.append([(s.name, list(s.offsets), s.local.tolist()) for s in state.shards])
        return loaded
    finally:
        parts.mesh.close()


def newest(folder: str) -> Path:
    (found,) = checkpoint.complete(Path(folder))
    return found


def pieces_equal(folder: str, of_ranks: tuple[list[tuple[str, list[int], Any]], ...]) -> None:
    """Every rank's pieces are those of the saved tensors, to the last bit, and together all of them."""
    saved = dict(checkpoint.tensors(newest(folder), names=_names(folder)))
    seen = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in saved.items()}
    for pieces in of_ranks:
        for name, offsets, values in pieces:
            piece = torch.tensor(values, dtype=torch.float64)
            if piece.numel():
                there = cases.place(offsets, piece)
                assert torch.equal(saved[name][there], piece), f"{name} from {folder}"
                seen[name][there] = True
    assert all(mask.all() for mask in seen.values()), "the ranks do not hold all of it"


def _names(folder: str) -> list[str]:
    from shoal.checkpoint import manifest

    return list(manifest.read(newest(folder)).tensors)
