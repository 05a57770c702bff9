"""Loss on held-out text: every valid token once, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from shoal.data.batch import Batch
from shoal.data.loader import Loader
from shoal.job import Job, shares
from shoal.parallel.replica import Replica
from shoal.training.feed import micro_batches, on_device
from shoal.training.objective import Objective


@dataclass(frozen=True)
class Validation:
    """nats: mean loss per token. tokens: how many were counted."""

    nats: float
    tokens: int


@torch.no_grad()
def validate(job: Job, replica: Replica[Batch], objective: Objective, loader: Loader, rows: int) -> Validation:
    """Mean loss of `rows` packed sequences, evenly spaced in the loader's data, spread over the replica's mesh."""
    mesh, layout = replica.mesh, replica.mesh.layout
    # Where replicas have equal parts, one micro-batch of each rank is enough for a turn.
    a_piece = 0 if layout.replica_share else layout.micro_batch
    turn = layout.pieces * (a_piece or max(1, job.train.global_batch // layout.pieces))
    mine = shares.rows(layout, turn, mesh.reader)
    rows = min(rows, loader.samples)
    # Every rank takes part in all turns (with fsdp they talk in each forward); missing rows weigh nothing.
    batches = []
    for first in range(0, rows, turn):
        wanted = first + np.arange(mine.start, mine.stop)
        batch = loader.rows(np.minimum(wanted, rows - 1) * loader.samples // rows)
        batch.weight_BL.mul_(torch.from_numpy(wanted < rows)[:, None])
        batches += micro_batches(batch, layout.micro_batch)
    # Compiling the forward alone would cost more than it saves on a pass this short.
    with torch.compiler.set_stance("force_eager"):
        tally = replica.evaluate([on_device(batch, mesh.device) for batch in batches], objective)
    totals = torch.stack([tally.loss_sum, tally.weight])
    mesh.wait(dist.all_reduce(totals, group=mesh.everyone, async_op=True))
    loss_sum, tokens = totals.tolist()
    return Validation(loss_sum / max(tokens, 1.0), int(tokens))
