"""What every rank of a run does, from its seat to the saved state. All launchers start this one entry point."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from shoal import checkpoint, device, mesh
from shoal.checkpoint import Saver
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.errors import CheckpointError, JobError
from shoal.job import Job, parse, read, write
from shoal.job.idle import idle_here
from shoal.mesh import Mesh, Seat
from shoal.models.spec import flops_per_token
from shoal.observe import environment, metrics
from shoal.observe.peak import matmul_peak
from shoal.observe.show import Show
from shoal.optim.schedule import learning_rate
from shoal.training import folder as folders
from shoal.training.feed import step_batches
from shoal.training.length import Length
from shoal.training.loop import GLANCE_TOKENS, Loop
from shoal.training.parts import assemble
from shoal.training.settle import cadences, replace_train, settle
from shoal.training.stop import Stop

# What follows the last step: its checkpoint, the sample, the report, in seconds.
_AFTERWARDS = 8.0


def main(
    seat: Seat,
    *,
    folder: str,
    job: str,
    prepared: str,
    started: float,
    command: list[str],
    predict: Callable[[Job, str, float], tuple[dict[str, float], str]] = lambda job, device, resident: ({}, ""),
) -> dict[str, Any]:
    """Trains a job (TOML), from the newest checkpoint in `folder` if there is one. Returns figures of the run.

    prepared: folder of the token store. started: time.time() of the user's command; `train.minutes` counts from it.
    command: the user's words, for the record. predict: of a job without `auto`, a device's name and the bytes that
    a rank's process has before anything is built, figures that are known before the run, and a sentence about them.
    """
    stop, run = Stop(), Path(folder)
    given = parse(job)
    assert given.layout is not None
    ranks = mesh.build(given.layout, seat, timeout=given.sync.timeout)
    device.keep_memory(ranks.device, gathering=given.layout.sharers > 1)
    resident = device.resident(ranks.device)
    with contextlib.ExitStack() as ending:
        ending.enter_context(ranks)
        show = ending.enter_context(Show(run, quiet=ranks.rank > 0))
        saver = ending.enter_context(_saver(run, given, ranks, started))
        corpus = Prepared.load(Path(prepared))
        training = Loader(corpus, given.data, "train", given.train.global_batch, given.train.seed)
        validation = held_out(corpus, given)
        length = None if given.train.steps else length_of(given, corpus, started)
        chosen = _chosen(run, seat, ranks, show.say)
        parts = assemble(settled(given, ranks, training, length, show.say), ranks, fresh=not chosen)

        def changed(job: Job) -> None:
            show.lengthen(job.train.steps)
            if length and length.decided:
                show.say(f"steps that fit, by the pace so far: {job.train.steps:,}")
            if ranks.rank == 0:
                with _keeping_the_old(show.say):
                    folders.write_job(run, job)

        loop = Loop(parts, training, validation, saver, stop, show.step, show.say, length, changed, trace=run)
        if chosen:
            _go_on(loop, run, Path(chosen))
        if ranks.rank == 0:
            _write_down(run, parts.job, corpus, environment.collect(ranks.device, ranks.world, command), show.say)
        predicted, sentence = predict(parts.job, device.name(ranks.device), resident)
        if sentence:
            show.say(sentence)
        precision = parts.job.train.precision
        flops = flops_per_token(parts.job.model, parts.job.data.sequence_length)
        show.begin(loop.step, parts.job.train.steps, ranks.world, matmul_peak(ranks.device, precision), flops)
        stop.listen()
        finished = loop.run()
        show.end(loop.step, loop.last if finished else None)
        assert loop.saved is not None
        loop.saved.wait()
        if loop.saved.error:
            show.say(f"warning: {loop.saved.error}")
        # A run that was stopped has only a glance, of an earlier step.
        last = {"nats": loop.last.nats, "tokens": loop.last.tokens} if loop.last and finished else None
        return {
            "job": write(parts.job), "step": loop.step, "skipped": loop.skipped, "validation": last,
            "seconds": time.time() - started, "devices": ranks.world, "device": device.name(ranks.device),
            "stopped_by": "" if finished else stop.signal or "another rank", "mfu_note": show.note, **predicted,
        }  # fmt: skip


def _write_down(run: Path, job: Job, corpus: Prepared, found: dict[str, Any], say: Callable[[str], None]) -> None:
    """What the run is, into its folder. found: of the machine."""
    folders.set_aside(run, say)
    with _keeping_the_old(say):
        folders.fill(run, job, corpus)
    environment.record(run, found, say)


def _saver(run: Path, job: Job, ranks: Mesh, started: float) -> Saver:
    # The start's time is the same on all of its ranks and another at the next start.
    nonce = f"{round(started * 1e6):x}"
    return Saver(run / "checkpoints", ranks.rank, ranks.world, job.checkpoint.keep, nonce=nonce)


def held_out(corpus: Prepared, job: Job) -> Loader | None:
    """What validation reads, if anything was held out."""
    if not corpus.validation.tokens:
        return None
    return Loader(corpus, replace(job.data, order="sequential"), "validation", job.train.global_batch, job.train.seed)


def length_of(job: Job, corpus: Prepared, started: float) -> Length:
    """Of a run of so many minutes. started: time.time() of the user's command."""
    validation = held_out(corpus, job)
    tokens = validation.tokens if validation else 0
    final, glance = (min(tokens, job.train.validate_tokens or most) for most in (tokens, GLANCE_TOKENS))
    return Length(started + 60 * job.train.minutes - _AFTERWARDS, glance, final)


def settled(job: Job, ranks: Mesh, training: Loader, length: Length | None, say: Callable[[str], None]) -> Job:
    """The job with every `auto` resolved, and so many steps as fit."""
    job = settle(job, ranks, step_batches(training, ranks, 0), say)
    assert job.layout is not None
    ranks.decide(job.layout)
    if length:
        # Of a run that is far from its end, where local steps would come together.
        far = assemble(replace_train(job, steps=1_000_000), ranks)
        steps = length.estimate(far, step_batches(training, ranks, 0))
        del far
        gc.collect()  # the model that was measured, before there is another
        say(f"steps that fit into what is left of {job.train.minutes:g} minutes: {max(steps, 0):,}")
        if steps < 1:
            say("warning: the start alone took that long; one step is trained. Ask for more minutes, or for steps")
        job = replace_train(job, steps=max(1, steps))
    for sentence in idle_here(replace(job, layout=ranks.layout)):
        say(sentence)
    return cadences(job)


def _go_on(loop: Loop, run: Path, chosen: Path) -> None:
    """Fills weights, optimizer and sync from this checkpoint."""
    loop.load(chosen)
    loop.say(f"goes on from {chosen}: step {loop.step:,}, sample {loop.position:,}")
    job, before = loop.parts.job, read(run / "job.toml")
    refuse_fewer(run, loop.step, job)
    if before.train.steps and loop.step < job.train.steps:
        old = learning_rate(before.optim, max(0, loop.step - 1), before.train.steps)
        new = learning_rate(job.optim, loop.step, job.train.steps)
        if (before.optim, before.train.steps) != (job.optim, job.train.steps):
            loop.say(f"the schedule is now that of {job.train.steps:,} steps: learning rate {old:.2e} → {new:.2e}")


def refuse_fewer(run: Path, step: int, job: Job) -> None:
    """Raises JobError where the run has done more steps, `step`, than the job has."""
    if step > job.train.steps:
        raise JobError(
            f"the run has done {step:,} steps already, more than the {job.train.steps:,} asked for",
            where=str(run),
            fix=f"--steps {2 * step}, or `shoal generate {run}`",
        )


def _chosen(run: Path, seat: Seat, ranks: Mesh, say: Callable[[str], None]) -> str:
    """The newest undamaged checkpoint, empty if there is none. What rank 0 found, or its error, in every rank."""
    if ranks.rank == 0:
        try:
            found = {"path": str(_newest(run, say) or "")}
        except CheckpointError as error:
            found = {"what": error.what, "where": error.where, "fix": error.fix}
        seat.store.set("checkpoint", msgspec.json.encode(found).decode())
    seat.store.wait(["checkpoint"], timedelta(days=30))  # however long rank 0 reads what was saved
    told = msgspec.json.decode(seat.store.get("checkpoint"), type=dict[str, str])
    if "what" in told:
        raise CheckpointError(told["what"], where=told["where"], fix=told["fix"])
    return told["path"]


def _newest(run: Path, say: Callable[[str], None]) -> Path | None:
    """Where to go on from; None at the start. As `newest_whole`."""
    newest = newest_whole(run, say)
    if newest is None and metrics.read(run):
        say("this run has no checkpoint yet: it begins again at step 0")
    return newest


def newest_whole(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint, None where there is none at all. CheckpointError where all are damaged."""
    saved = run / "checkpoints"
    newest = checkpoint.newest(saved, say)
    if newest is None and checkpoint.complete(saved):
        raise CheckpointError(
            "every checkpoint of this run is damaged; nothing was changed",
            where=str(saved),
            fix="restore one from a copy of the folder, or begin a new run",
        )
    return newest


@contextlib.contextmanager
def _keeping_the_old(say: Callable[[str], None]) -> Iterator[None]:
    """The job that is trained from now on is written within; that may fail."""
    try:
        yield
    except OSError as error:
        say(f"warning: cannot write job.toml ({error.strerror}); training goes on, and a resume with the old one")
