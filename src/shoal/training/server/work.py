"""One worker: pulls weights, computes gradients of the samples that it is granted, pushes them."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal import device, mesh, operations
from shoal.data.batch import Batch
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.job import Job, parse
from shoal.mesh import Mesh, Seat
from shoal.observe.log import speaker
from shoal.sync.server import messages as m
from shoal.sync.server.encoding import Encoder
from shoal.sync.server.follower import Follower
from shoal.sync.server.messages import Range
from shoal.sync.server.node.work import Server
from shoal.sync.server.worker import Worker
from shoal.training.feed import micro_batches, on_device
from shoal.training.parts import spread
from shoal.training.server import plan
from shoal.training.server.apart import Apart
from shoal.training.server.glances import Glances, Words
from shoal.training.server.growth import wait_for
from shoal.training.stop import Stop
from shoal.training.validate import validate
from shoal.training.worker import held_out


def main(
    seat: Seat, *, folder: str, job: str, prepared: str, nonce: str, number: int, life: int, leaves: bool = False,
    micro_batch: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Worker `number`, one rank of it, until there is nothing left to compute. nonce: of this start of the run. life:
    how often it was started.

    leaves: it was started by `shoal join`: a signal asks it to leave the run, with all that it has computed, and not to
    end at once; and it says itself how it stands with the coordinator. micro_batch:
    sequences that a rank computes at a time, where they are others than the layout's.
    """
    stop = Stop()
    if leaves:
        stop.listen()
    run, whole = Path(folder), parse(job)
    given = plan.of_worker(whole, micro_batch)
    assert given.layout is not None
    with contextlib.ExitStack() as ending:
        ranks = ending.enter_context(mesh.build(given.layout, seat, timeout=given.sync.timeout))
        device.keep_memory(ranks.device, gathering=given.layout.sharers > 1)
        corpus = Prepared.load(Path(prepared))
        training = Loader(corpus, given.data, "train", given.train.global_batch, given.train.seed)
        validation = held_out(corpus, given) if number == 0 else None
        replica, objective = spread(given, ranks, fresh=False)
        glances, answered = Glances(given), 0
        # It is asked between `begin` and its return, when nobody else reads.
        words = Words(training, glances if validation is not None else None) if Words.enough(given) else None
        sync = ending.enter_context(
            Server(
                ranks,
                replica,
                plan.placement(whole),
                machine=_machine(whole, run, number),
                encoder=_encoder(whole, ranks, number),
                words=words,
                leaving=lambda: stop.asked,
                say=speaker() if leaves else None,
                station=lambda me: plan.station(whole, run, me, ("coordinator", "shard"), nonce),
            )
        )
        apart = Apart(given, ranks, replica, objective) if given.server.local_steps > 1 else None
        while (work := sync.begin()) is not None:
            if given.data.grow:
                wait_for(training, work.samples.stop)
            step = work.samples.start // given.train.global_batch
            operations.step(step + 1)
            if validation is not None and glances.due(step, work.whole):
                # Of the weights that it pulled; in bsp the others wait for it meanwhile.
                found = validate(given, replica, objective, validation, glances.rows)
                sync.note(m.Noted(work.version, found.nats, found.tokens))
                objective.lap(ranks.device)
            if apart is None:
                objective.step = step
                batches = _batches(training, ranks, work.samples)
                loss_sum, weight = sync.collect(replica.gradients(batches, objective))
            else:
                pieces = _steps(work.samples, plan.step_share(whole, number) * plan.unit(whole))
                loss_sum, weight = apart.learn((each, _batches(training, ranks, each)) for each in pieces)
            device.synchronize(ranks.device)
            drift, used = (apart.drift, apart.used) if apart is not None else (0.0, replica.used)
            experts = tuple(map(tuple, used.totals_NX.tolist())) if used is not None else ()
            sync.end(work, loss_sum, weight, device.memory_peak(ranks.device) / 2**30, drift, experts)
            answered += 1
        return {"answered": answered}


def _machine(whole: Job, run: Path, number: int) -> Worker:
    rules = plan.rules(whole)
    return Worker(
        number, plan.share(whole, number), whole.server.shards, model=plan.model_hash(whole),
        tokenizer=plan.tokenizer_hash(run), retry=rules.retry, heartbeat=rules.lease / 4,
        follower=Follower(rules.codec) if rules.codec != "none" else None,
    )  # fmt: skip


def _encoder(whole: Job, ranks: Mesh, number: int) -> Encoder | None:
    rules = plan.rules(whole)
    return Encoder(rules, seed=whole.train.seed, worker=number, part=ranks.rank) if rules.codec != "none" else None


def _batches(loader: Loader, ranks: Mesh, samples: Range) -> list[Batch]:
    """This rank's micro-batches of the samples that its worker was granted: as many on each, though what an earlier
    layout left over may not be a multiple of their number. Rows that fill up weigh nothing."""
    part = -(-(samples.stop - samples.start) // ranks.layout.readers)
    wanted_N = samples.start + ranks.reader * part + np.arange(part)
    batch = loader.rows(loader.order(np.minimum(wanted_N, samples.stop - 1)))
    batch.weight_BL.mul_(torch.from_numpy(wanted_N < samples.stop)[:, None])
    return micro_batches(on_device(batch, ranks.device), ranks.layout.micro_batch)


def _steps(samples: Range, size: int) -> list[Range]:
    """What was granted, a step of a worker's own at a time."""
    start, stop = samples
    return [Range(first, min(stop, first + size)) for first in range(start, stop, size)]
