"""This rank's micro-batches of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch

from shoal.data.batch import Batch
from shoal.data.loader import Loader
from shoal.job import shares
from shoal.mesh import Mesh


def micro_batches(batch: Batch, size: int) -> list[Batch]:
    """Cuts a batch into pieces of `size` sequences (0: one piece)."""
    rows = batch.tokens_BL.shape[0]
    size = size or rows
    return [_map(batch, lambda t, i=i: t[i : i + size]) for i in range(0, rows, size)]


def on_device(batch: Batch, where: torch.device) -> Batch:
    return _map(batch, lambda t: t.to(where, non_blocking=True))


def _map(batch: Batch, fn) -> Batch:
    return Batch(**{f.name: fn(getattr(batch, f.name)) for f in fields(Batch)})


def step_batch(loader: Loader, mesh: Mesh, position: int, taking: Sequence[int] | None = None) -> Batch | None:
    """What this rank computes of the step that begins at sample `position`; None where its replica does not take it.

    taking: the replicas that take it, None = all.
    """
    mine = shares.rows(mesh.layout, loader.global_batch, mesh.reader, taking)
    if not mine:
        return None
    return on_device(loader.stretch(loader.after(position, mine.start), len(mine)), mesh.device)


def step_batches(loader: Loader, mesh: Mesh, position: int, taking: Sequence[int] | None = None) -> list[Batch]:
    """The same as micro-batches."""
    batch = step_batch(loader, mesh, position, taking)
    return [] if batch is None else micro_batches(batch, mesh.layout.micro_batch)
