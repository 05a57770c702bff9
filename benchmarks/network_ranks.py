"""What a worker of `benchmarks/network.py` does: trains shoal's model with shoal's sync, or with DDP by hand."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmarks import hosts
from benchmarks.layouts import adamw, model_of
from torch.nn.parallel import DistributedDataParallel

from shoal import device
from shoal import mesh as meshes
from shoal.data.batch import Batch
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.job import Job, parse
from shoal.mesh import Mesh, Seat
from shoal.models.spec import count
from shoal.observe.traffic import traffic
from shoal.ops.attention import document_attend
from shoal.optim.schedule import learning_rate
from shoal.training.feed import step_batches
from shoal.training.parts import assemble
from shoal.training.validate import validate

# Steps before those that are timed: torch's PowerSGD compresses from the third on.
_WARM_UP = 3


class Worker(Protocol):
    """step: trains on the samples of the step of this number, from 0. loss: of the first `rows` held-out rows, in nats
    per token, the same on all ranks."""

    def step(self, number: int) -> None: ...

    def loss(self, rows: int) -> float: ...


def train(
    seat: Seat, *, job: str, prepared: str, by_hand: str, names: list[str], steps: int, least: int,
    target: float | None, every: int, rows: int,
) -> dict[str, Any]:  # fmt: skip
    """Trains until the loss is `target` or less, but at least `least` and at most `steps` steps; looks `every` steps.

    losses: [step, loss] of each look. seconds: of training until each look, without the looks.
    """
    what, mesh = parse(job), _meet(seat, job, names)
    worker = _worker(what, mesh, prepared, by_hand)
    losses: list[tuple[int, float]] = []
    seconds: list[float] = []
    spent = 0.0
    for number in range(steps):
        start = time.perf_counter()
        worker.step(number)
        spent += time.perf_counter() - start
        if (number + 1) % every == 0:
            losses.append((number + 1, worker.loss(rows)))
            seconds.append(spent)
            if target is not None and number + 1 >= least and min(loss for _, loss in losses) <= target:
                break
    del worker
    _part(mesh)
    return {"losses": losses, "seconds": seconds}


def clock(seat: Seat, *, job: str, prepared: str, by_hand: str, names: list[str], steps: int) -> dict[str, Any]:
    """seconds: of each of so many steps, after a few others. sent: bytes of this rank in them. tokens: of all ranks."""
    what, mesh = parse(job), _meet(seat, job, names)
    worker = _worker(what, mesh, prepared, by_hand)
    for number in range(_WARM_UP):
        worker.step(number)
    dist.barrier()
    before = traffic()
    ends = [time.perf_counter()]
    for number in range(_WARM_UP, _WARM_UP + steps):
        worker.step(number)
        ends.append(time.perf_counter())
    dist.barrier()  # acknowledged by then, and so counted
    after = traffic()
    assert before is not None
    assert after is not None
    del worker
    _part(mesh)
    return {
        "seconds": np.diff(ends).tolist(), "sent": after.sent - before.sent,
        "tokens": steps * what.train.global_batch * what.data.sequence_length,
    }  # fmt: skip


def _meet(seat: Seat, job: str, names: list[str]) -> Mesh:
    """names: namespaces of the hosts, one for each rank; none = all on this machine's loopback."""
    if names:
        hosts.enter(names[seat.member])
        # What is sent to the store, which stays on this machine's loopback, is not limited: nothing to speak of.
        os.environ["GLOO_SOCKET_IFNAME"] = hosts.INTERFACE
    torch.set_num_threads(1)
    layout = parse(job).layout
    assert layout is not None
    mesh = meshes.build(layout, seat)
    device.keep_memory(mesh.device)
    return mesh


def _part(mesh: Mesh) -> None:
    """When nothing that talks through the mesh is held any more, for then its groups end here: were they to end with
    DDP, that would wait, with the interpreter, for threads that need the interpreter to drop PowerSGD's callbacks."""
    gc.collect()
    device.let_go()
    mesh.close()


def _worker(what: Job, mesh: Mesh, prepared: str, by_hand: str) -> Worker:
    corpus = Prepared.load(Path(prepared))
    training = Loader(corpus, what.data, "train", what.train.global_batch, what.train.seed)
    held_out = Loader(corpus, what.data, "validation", what.train.global_batch)
    return ByHand(what, mesh, training, held_out, by_hand) if by_hand else Shoal(what, mesh, training, held_out)


class Shoal:
    """What the loop of `shoal train` does in a step, without its files and its display."""

    def __init__(self, what: Job, mesh: Mesh, training: Loader, held_out: Loader):
        self.parts, self.training, self.held_out = assemble(what, mesh), training, held_out

    def step(self, number: int) -> None:
        parts = self.parts
        batches = step_batches(self.training, parts.mesh, number * parts.job.train.global_batch)
        parts.objective.step = number
        parts.sync.begin(number)
        applied = parts.sync.end(parts.replica.gradients(batches, parts.objective))
        assert applied.applied, "the loss or the gradient is not finite"

    def loss(self, rows: int) -> float:
        with self.parts.sync.agreed():
            parts = self.parts
            return validate(parts.job, parts.replica, parts.objective, self.held_out, rows).nats


class ByHand:
    """The loop of PyTorch's tutorials: `DistributedDataParallel`, with its PowerSGD hook for `powersgd:RANK`."""

    def __init__(self, what: Job, mesh: Mesh, training: Loader, held_out: Loader, codec: str):
        self.what, self.mesh, self.training, self.held_out = what, mesh, training, held_out
        self.model = model_of(what)
        self.optimizer = adamw(self.model, what)
        kind, _, rank = codec.partition(":")
        # The hook waits for operations in gloo's threads, which are two: with a second bucket they wait for ever, or
        # ranks enter different ones. So it has one. None = as DDP chooses.
        everything = 4.0 * count(what.model) / 2**20 + 1 if kind == "powersgd" else None
        self.parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True, bucket_cap_mb=everything)
        if kind == "powersgd":
            from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as hooks

            # As soon as torch can: every step before is sent whole.
            state = hooks.PowerSGDState(None, matrix_approximation_rank=int(rank), start_powerSGD_iter=2)
            self.parallel.register_comm_hook(state, hooks.powerSGD_hook)

    def _loss(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Sum over this batch's tokens."""
        logits_BLV = model(batch.tokens_BL, batch.position_BL, document_attend(batch.document_BL))
        nll_N = F.cross_entropy(logits_BLV.flatten(0, 1), batch.labels_BL.flatten(), reduction="none")
        return (nll_N * batch.weight_BL.flatten()).sum()

    def step(self, number: int) -> None:
        train = self.what.train
        (batch,) = step_batches(self.training, self.mesh, number * train.global_batch)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.what.optim, number, train.steps)
        self.optimizer.zero_grad()
        (self._loss(self.parallel, batch) / batch.weight_BL.sum()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.what.optim.clip)
        self.optimizer.step()

    @torch.no_grad()
    def loss(self, rows: int) -> float:
        totals = torch.zeros(2)
        # The same rows as `validate` takes.
        for row in range(self.mesh.rank, min(rows, self.held_out.samples), self.mesh.world):
            batch = self.held_out.rows(np.array([row]) * self.held_out.samples // min(rows, self.held_out.samples))
            totals += torch.stack([self._loss(self.model, batch), batch.weight_BL.sum()])
        dist.all_reduce(totals)
        return (totals[0] / totals[1]).item()
