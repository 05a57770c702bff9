"""This rank's micro-batches of a step."""

from __future__ import annotations

from dataclasses import fields

import torch

from shoal.data.batch import Batch
from shoal.data.loader import Loader
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


def step_batches(loader: Loader, mesh: Mesh, position: int) -> list[Batch]:
    """The micro-batches of this rank: its part of the global batch that begins at sample `position`."""
    batch = on_device(loader.batch(position, mesh.reader, mesh.layout.readers), mesh.device)
    return micro_batches(batch, mesh.layout.micro_batch)
