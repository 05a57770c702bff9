"""Loss on held-out text: every valid token once, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from shoal.data.batch import Batch
from shoal.data.loader import Loader
from shoal.job import Job
from shoal.parallel.replica import Replica
from shoal.training.feed import on_device
from shoal.training.objective import Objective


@dataclass(frozen=True)
class Validation:
    """nats: mean loss per token. tokens: how many were counted."""

    nats: float
    tokens: int


@torch.no_grad()
def validate(job: Job, replica: Replica[Batch], objective: Objective, loader: Loader, rows: int) -> Validation:
    """Mean loss of `rows` packed sequences, evenly spaced in the loader's data, spread over the replica's mesh."""
    mesh, readers = replica.mesh, replica.mesh.layout.readers
    size = mesh.layout.micro_batch or max(1, job.train.global_batch // readers)
    rows = min(rows, loader.samples)
    # Every rank runs as many forwards as the busiest (with fsdp they talk in each); missing rows weigh nothing.
    rounds = -(-rows // (size * readers))
    batches = []
    for turn in range(rounds):
        first = (turn * readers + mesh.reader) * size
        wanted = np.arange(first, first + size)
        batch = loader.rows(np.minimum(wanted, rows - 1) * loader.samples // rows)
        batch.weight_BL.mul_(torch.from_numpy(wanted < rows)[:, None])
        batches.append(batch)
    # Compiling the forward alone would cost more than it saves on a pass this short.
    with torch.compiler.set_stance("force_eager"):
        tally = replica.evaluate([on_device(batch, mesh.device) for batch in batches], objective)
    totals = torch.stack([tally.loss_sum, tally.weight])
    mesh.wait(dist.all_reduce(totals, group=mesh.everyone, async_op=True))
    loss_sum, tokens = totals.tolist()
    return Validation(loss_sum / max(tokens, 1.0), int(tokens))
