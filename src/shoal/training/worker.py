"""What every rank of a run does, from its seat to the saved state. All launchers start this one entry point."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from shoal import checkpoint, device, mesh
from shoal.checkpoint import Saver
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.job import Job, read, write
from shoal.mesh import Mesh, Seat
from shoal.models.spec import flops_per_token
from shoal.observe import environment
from shoal.observe.peak import matmul_peak
from shoal.observe.show import Show
from shoal.training.feed import micro_batches, on_device
from shoal.training.loop import GLANCE_TOKENS, Loop
from shoal.training.parts import Parts, assemble
from shoal.training.settle import replace_train, settle, steps_in
from shoal.training.stop import Stop

# What follows the last step: its checkpoint, the sample, the report, in seconds.
_AFTERWARDS = 8.0


def main(seat: Seat, *, folder: str, prepared: str, started: float, command: list[str]) -> dict[str, Any]:
    """Trains the job in `folder`/job.toml, from its newest checkpoint if there is one. Returns figures of the run.

    prepared: folder of the token store. started: time.time() of the user's command; `train.minutes` counts from it.
    command: the user's words, for the record.
    """
    stop, run = Stop(), Path(folder)
    job = read(run / "job.toml")
    assert job.layout is not None
    ranks = mesh.build(job.layout, seat, timeout=job.sync.timeout)
    with contextlib.ExitStack() as ending:
        ending.callback(ranks.close)
        show = ending.enter_context(Show(run, quiet=ranks.rank > 0))
        saver = ending.enter_context(_saver(run, job, ranks, started))
        corpus = Prepared.load(Path(prepared))
        training = Loader(corpus, job.data, "train", job.train.global_batch, job.train.seed)
        validation = _validation(corpus, job)
        parts = _parts(job, ranks, training, validation, started, show.say)
        if ranks.rank == 0:
            (run / "job.toml").write_text(write(parts.job), encoding="utf-8")
            environment.record(run, environment.collect(ranks.device, ranks.world, command), show.say)
        loop = Loop(parts, training, validation, saver, stop, show.step, show.say)
        _resume(loop, run / "checkpoints", seat, ranks)
        precision = parts.job.train.precision
        flops = flops_per_token(parts.job.model, parts.job.data.sequence_length)
        show.begin(loop.step, parts.job.train.steps, ranks.world, matmul_peak(ranks.device, precision), flops)
        finished = loop.run()
        show.end(loop.step, loop.last)
        assert loop.saved is not None
        loop.saved.wait()
        if loop.saved.error:
            show.say(f"warning: {loop.saved.error}")
        last = {"nats": loop.last.nats, "tokens": loop.last.tokens} if loop.last else None
        return {
            "step": loop.step,
            "validation": last,
            "seconds": time.time() - started,
            "devices": ranks.world,
            "device": device.name(ranks.device),
            "stopped_by": "" if finished else stop.signal or "another rank",
            "mfu_note": show.note,
        }


def _saver(run: Path, job: Job, ranks: Mesh, started: float) -> Saver:
    # The start's time is the same on all of its ranks and another at the next start.
    nonce = f"{round(started * 1e6):x}"
    return Saver(run / "checkpoints", ranks.rank, ranks.world, job.checkpoint.keep, nonce=nonce)


def _validation(corpus: Prepared, job: Job) -> Loader | None:
    if not corpus.validation.tokens:
        return None
    return Loader(corpus, replace(job.data, order="sequential"), "validation", job.train.global_batch, job.train.seed)


def _parts(
    job: Job, ranks: Mesh, training: Loader, validation: Loader | None, started: float, say: Callable[[str], None]
) -> Parts:
    """Model, optimizer and sync, with every `auto` of the job resolved on the way."""
    batch = on_device(training.batch(0, ranks.rank, ranks.world), ranks.device)
    batches = micro_batches(batch, ranks.layout.micro_batch)
    job = settle(job, ranks, batches, say)
    if job.train.steps:
        return assemble(job, ranks)
    parts = assemble(replace_train(job, steps=1), ranks)
    held_out = validation.tokens if validation else 0
    left = 60 * job.train.minutes - (time.time() - started) - _AFTERWARDS
    steps = steps_in(left, parts, batches, validated=held_out + 9 * min(held_out, GLANCE_TOKENS))
    say(f"{steps:,} steps fit into what is left of {job.train.minutes:g} minutes")
    return assemble(replace_train(job, steps=steps), ranks)


def _resume(loop: Loop, checkpoints: Path, seat: Seat, ranks: Mesh) -> None:
    """Fills weights, optimizer and sync from the newest undamaged checkpoint. Rank 0 chooses for all."""
    if ranks.rank == 0:
        newest = checkpoint.newest(checkpoints, loop.say)
        seat.store.set("checkpoint", str(newest or ""))
    chosen = seat.store.get("checkpoint").decode()
    if chosen:
        loop.load(Path(chosen))
        loop.say(f"goes on from {chosen}: step {loop.step:,}, sample {loop.position:,}")
