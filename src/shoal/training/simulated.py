"""A job's replicas in one process, on simulated machines: the real model, data, optimizer and sync; seconds that are
computed, not measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.errors import DivergedError
from shoal.job import Job, shares
from shoal.sync.simulate.links import Links
from shoal.sync.simulate.ranks import Network, SimulatedMesh
from shoal.sync.simulate.turns import Turns
from shoal.training.feed import step_batches
from shoal.training.parts import Parts, assemble
from shoal.training.validate import validate
from shoal.training.worker import held_out


@dataclass(frozen=True)
class Machines:
    """One for each replica. seconds: that it computes on a sequence. rate, delay: of their lines, as in `Links`."""

    seconds: tuple[float, ...]
    rate: float = math.inf
    delay: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Of one sync. Seconds are simulated ones."""

    sync: str
    seconds: float
    """To the end of the last step of the last replica, without validations and checkpoints."""
    steps: int
    tokens: int
    """That were learned from."""
    tokens_per_second: float
    wait: list[float]
    """Of each replica: the share of the time in which it waits for others and the network."""
    sent_bytes: list[int]
    """By each replica to others."""
    losses: list[float]
    """Of each step, the mean over the tokens of all replicas, each with weights of its own."""
    val_loss: float | None
    """At the end, of the weights that all have in common, as a run validates; None where nothing is held out."""


@dataclass(frozen=True)
class _Told:
    """By one replica. counted: of each step, its loss summed over tokens, and the tokens."""

    counted: list[tuple[float, float]]
    seconds: float
    waited: float
    sent: int
    val_loss: float | None


def simulate(job: Job, corpus: Prepared, machines: Machines, say: Callable[[str], None]) -> Outcome:
    """Trains the job, which has no `auto` left and replicas of one rank each, for its steps; on the CPU.

    say: gets a sentence now and then. Raises what training raises, as DivergedError.
    """
    assert job.layout is not None
    replicas = job.layout.replicas
    assert len(machines.seconds) == replicas
    training = Loader(corpus, job.data, "train", job.train.global_batch, job.train.seed)
    validation = held_out(corpus, job)
    turns: Turns[_Told] = Turns(replicas)
    links = Links(replicas, machines.rate, machines.delay)
    network = Network(turns, links)
    ended: dict[int, list[float]] = {}

    def program(rank: int) -> _Told:
        assert job.layout is not None
        parts = assemble(job, SimulatedMesh(job.layout, rank, network))
        counted = []
        for step, tally in enumerate(_steps(parts, training, turns, machines.seconds[rank]), 1):
            counted.append(tally)
            if step % max(1, job.train.steps // 10) == 0:
                ended.setdefault(step, []).append(turns.now[rank])
                if len(ended[step]) == replicas:
                    say(f"{named(job)}: step {step:,} of {job.train.steps:,}, {max(ended.pop(step)):.1f} s")
        seconds, waited, sent = turns.now[rank], turns.waited[rank], links.sent[rank]
        return _Told(counted, seconds, waited, sent, _validated(parts, validation))

    return _outcome(job, turns.run(program))


def _steps(parts: Parts, training: Loader, turns: Turns[_Told], seconds: float) -> Iterator[tuple[float, float]]:
    """All steps of one replica, as the training loop takes them: of each, when it is done, loss and tokens."""
    job, mesh, position = parts.job, parts.mesh, 0
    for step in range(job.train.steps):
        batches = step_batches(training, mesh, position, shares.taking(job.sync, mesh.layout.replicas, step))
        position += shares.samples(mesh.layout, job.sync, job.train.global_batch, step)
        parts.objective.step = step
        parts.sync.begin(step)
        # Before, so that gradients leave when the last backward pass has ended: nothing overlaps with it.
        turns.compute(mesh.rank, seconds * sum(len(batch.sample_B) for batch in batches))
        tally = parts.replica.gradients(batches, parts.objective)
        counted = tally.loss_sum.item(), tally.weight.item()
        applied = parts.sync.end(tally)
        if not applied.applied and job.train.on_nonfinite == "stop":
            whence = f"; {applied.whence}" if applied.whence else ""
            raise DivergedError(
                f"loss or gradient is not finite (gradient norm {applied.grad_norm}{whence})",
                where=f"replica {mesh.replica}, step {step + 1}", fix="lower optim.lr, or train.on_nonfinite=skip",
            )  # fmt: skip
        yield counted


def _validated(parts: Parts, validation: Loader | None) -> float | None:
    if validation is None:
        return None
    rows = validation.samples
    if most := parts.job.train.validate_tokens:
        rows = max(1, most // parts.job.data.sequence_length)
    with parts.sync.agreed():
        return validate(parts.job, parts.replica, parts.objective, validation, rows).nats


def _outcome(job: Job, told: list[_Told]) -> Outcome:
    losses, tokens = [], 0.0
    for of_step in zip(*(one.counted for one in told), strict=True):
        loss, counted = (sum(numbers) for numbers in zip(*of_step, strict=True))
        # There may be sequences in which no token counts.
        losses.append(loss / counted if counted else math.nan)
        tokens += counted
    seconds = max(one.seconds for one in told)
    return Outcome(
        sync=named(job),
        seconds=seconds,
        steps=len(losses),
        tokens=round(tokens),
        tokens_per_second=tokens / seconds,
        wait=[one.waited / seconds for one in told],
        sent_bytes=[one.sent for one in told],
        losses=losses,
        val_loss=told[0].val_loss,
    )


def named(job: Job) -> str:
    """The sync, how often, and the codec."""
    sync = job.sync
    often = f" every {sync.every}" if sync.name != "allreduce" else ""
    parts = f", {sync.fragments} fragments" if sync.fragments > 1 else ""
    late = f", delay {sync.delay}" if sync.delay else ""
    return f"{sync.name}{often}{parts}{late}" + (f", {sync.codec}" if sync.codec != "none" else "")
