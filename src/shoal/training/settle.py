"""Every `auto` of a job becomes a value, measured once at the start of a run and written into its job.toml.

It is measured in the job's own layout (`training.measure`), by all ranks at the same time, so each feels the load of
its neighbours; what the slowest one needs decides for everybody.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shoal.data.batch import Batch
from shoal.job import Job, Layout, shares
from shoal.job.fits import excluded, shared_out
from shoal.job.layout import MEASURED
from shoal.mesh import Mesh
from shoal.models.spec import count
from shoal.parallel.stages import balance, measured_costs
from shoal.sync.choose import CODECS, choose
from shoal.training import measure

# Replicas whose speeds differ by less are equal: as much comes of measuring.
_ALIKE = 1.05
# Compiling is tried only where the run is long enough for it to matter, in seconds of uncompiled computing.
_TRY_COMPILE = 90.0


def settle(job: Job, mesh: Mesh, batches: list[Batch], say: Callable[[str], None]) -> Job:
    """The job with precision, compile, stages, shares, pace and codec decided, by measuring a few of its blocks on
    real batches.

    batches: the micro-batches of this rank's first step. Raises nothing that is not raised on all ranks, whatever they
    measured: the job is the same everywhere.
    """
    if job.train.precision == "auto":
        job = replace_train(job, precision=_precision(job, mesh, batches, say))
    if job.train.compile == "auto" and (pair := excluded(replace_train(job, compile="on"))):
        say(f"compile off: {pair.reason}")
        job = replace_train(job, compile="off")
    elif job.train.compile == "auto":
        job = replace_train(job, compile="on" if _compiling_pays(job, mesh, batches, say) else "off")
    layout = job.layout
    assert layout is not None
    if layout.stages == MEASURED:
        job = replace(job, layout=replace(layout, stages=_stages(job, mesh, batches[0], say)))
    if shares.AUTO in (layout.replica_share, job.sync.pace):
        job = _uneven(job, mesh, batches, say)
    if job.sync.codec == "auto":
        numbers = count(job.model) // mesh.layout.ranks_per_replica
        job = _with_codec(job, choose(mesh, codecs_of(job), numbers, say))
    return job


def codecs_of(job: Job) -> list[str]:
    """Those that `auto` may become: without feedback, none of less than 16 bits."""
    known = CODECS if job.sync.feedback else CODECS[-1:]
    return [name for name in known if excluded(_with_codec(job, name)) is None]


def _with_codec(job: Job, codec: str) -> Job:
    return replace(job, sync=replace(job.sync, codec=codec))


def cadences(job: Job) -> Job:
    """The job with how often it validates and saves, of a number of steps that is known."""
    steps = job.train.steps
    job = replace_train(job, validate_every=job.train.validate_every or max(1, steps // 10))
    return replace(job, checkpoint=replace(job.checkpoint, every=job.checkpoint.every or max(1, steps // 5)))


def _precision(job: Job, mesh: Mesh, batches: list[Batch], say: Callable[[str], None]) -> str:
    probe = _measured(job, batches)
    seconds = {
        precision: measure.step(replace_train(job, precision=precision, compile="off"), mesh, probe)[0]
        for precision in ("fp32", "bf16")
    }
    best = min(seconds, key=lambda precision: seconds[precision])
    say(f"precision {best}: " + ", ".join(f"{p} {1e3 * s:.0f} ms" for p, s in seconds.items()) + f" {_with(job)}")
    return best


def _compiling_pays(job: Job, mesh: Mesh, batches: list[Batch], say: Callable[[str], None]) -> bool:
    # Any rank may be on a machine of its own: all of them try, or none.
    missing = mesh.device.type == "cpu" and not shutil.which("g++") and not shutil.which("clang++")
    if mesh.largest(missing):
        say("compile off: no C++ compiler (g++) on this machine")
        return False
    probe = _measured(job, batches)
    eager, _ = measure.step(replace_train(job, compile="off"), mesh, probe)
    a_step = eager * len(batches) / len(probe) * job.model.num_hidden_layers / _blocks(job)
    length = a_step * job.train.steps if job.train.steps else 60 * job.train.minutes
    if length < _TRY_COMPILE:
        say(f"compile off: the run is too short to repay it (about {length:.0f} s)")
        return False
    compiled, cost = measure.step(replace_train(job, compile="on"), mesh, probe)
    gain = length * (1 - compiled / eager)
    say(
        f"compile {'on' if gain > cost else 'off'}: {1e3 * eager:.0f} ms eager, {1e3 * compiled:.0f} ms compiled "
        f"{_with(job)}, {cost:.0f} s to compile, run of about {length:.0f} s"
    )
    return gain > cost


def _stages(job: Job, mesh: Mesh, batch: Batch, say: Callable[[str], None]) -> str:
    """Blocks of each stage, such as `5+3`."""
    assert job.layout is not None
    seconds = measure.pieces(job, mesh, batch)
    sizes = balance(*measured_costs(job.model, seconds), job.layout.stage_count)
    split = "+".join(map(str, sizes))
    say(f"stages by measured cost: {split} (" + ", ".join(f"{p} {1e3 * s:.1f} ms" for p, s in seconds.items()) + ")")
    return split


def _uneven(job: Job, mesh: Mesh, batches: list[Batch], say: Callable[[str], None]) -> Job:
    """With `replica_share` and `sync.pace` by how fast replicas are; the pace by what whole shares leave uneven."""
    assert job.layout is not None
    if job.layout.replicas == 1:
        return replace(job, sync=replace(job.sync, pace=""))
    return uneven(job, measure.of_replicas(job, mesh, _measured(job, batches)), "measured", say)


def uneven(job: Job, seconds_R: list[float], how: str, say: Callable[[str], None]) -> Job:
    """The job with `replica_share` and `sync.pace` decided, where they are `auto`, by the seconds that each replica
    takes for a sequence. how: they are known, for who reads it."""
    assert job.layout is not None
    told = f"({', '.join(f'{1e3 * s:.3g}' for s in seconds_R[:16])}{', …' * (len(seconds_R) > 16)} ms a sequence)"
    layout, batch = job.layout, job.train.global_batch
    if layout.replica_share == shares.AUTO:
        layout = _shared(layout, batch, seconds_R)
        say(f"replica_share by {how} speed: {layout.replica_share or 'equal'} {told}")
    pace = job.sync.pace
    if pace == shares.AUTO:
        pace = _pace([s * n for s, n in zip(seconds_R, shares.sequences(layout, batch), strict=True)], job.sync.every)
        say(f"sync.pace by {how} speed: {pace or 'equal'} {told}")
    return replace(job, layout=layout, sync=replace(job.sync, pace=pace))


def _shared(layout: Layout, batch: int, seconds_R: list[float]) -> Layout:
    """By the seconds that each replica takes for a sequence; equal where they are alike and the batch allows it."""
    if max(seconds_R) >= _ALIKE * min(seconds_R):
        return shared_out(batch, layout, [1 / seconds for seconds in seconds_R])
    even = replace(layout, replica_share="")
    fits = batch % (even.pieces * max(1, even.micro_batch)) == 0
    return even if fits else shared_out(batch, layout, [1.0] * layout.replicas)


def _pace(seconds_R: list[float], every: int) -> str:
    """Of replicas that take so long for a step of their own, the steps of a round: at least one each."""
    fastest = min(seconds_R)
    if max(seconds_R) < _ALIKE * fastest:
        return ""
    return shares.written([max(1, round(every * fastest / seconds)) for seconds in seconds_R])


def _measured(job: Job, batches: list[Batch]) -> list[Batch]:
    """One micro-batch, or with a pipeline all of a step: its schedule may need them, and its bubble goes by them."""
    assert job.layout is not None
    return batches if job.layout.pipeline > 1 else batches[:1]


def _blocks(job: Job) -> int:
    return measure.shallow(job).model.num_hidden_layers


def _with(job: Job) -> str:
    return f"with {_blocks(job)} of {job.model.num_hidden_layers} blocks"


def replace_train(job: Job, **changes: Any) -> Job:
    return replace(job, train=replace(job.train, **changes))
