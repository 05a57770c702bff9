"""Every `auto` of a job becomes a value, measured once at the start of a run and written into its job.toml.

All ranks measure at the same time, so each feels the load of its neighbours; rank 0 decides for everybody.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shoal import device
from shoal.data.batch import Batch
from shoal.job import Job
from shoal.job.fits import excluded
from shoal.mesh import Mesh
from shoal.models import build
from shoal.models.spec import parameters
from shoal.models.storage import canonical
from shoal.ops.initialise import initialise_
from shoal.training.objective import Objective
from shoal.training.precision import stored

# Compiling is tried only where the run is long enough for it to matter, in seconds of uncompiled computing.
_TRY_COMPILE = 90.0
# Layers of the model that is measured: enough for blocks to outweigh nothing but themselves, small for any machine.
_PROBE_LAYERS = 2


def settle(job: Job, mesh: Mesh, batches: list[Batch], say: Callable[[str], None]) -> Job:
    """The job with precision and compile decided, by measuring a shallow copy of its model on real batches."""
    train, batch = job.train, batches[0]
    if train.precision == "auto":
        candidates = {p: _probe(replace_train(job, precision=p, compile="off"), batch) for p in ("fp32", "bf16")}
        seconds = {p: mesh.largest(s) for p, (s, _) in candidates.items()}
        best = min(seconds, key=lambda p: seconds[p])
        say(f"precision {best}: " + ", ".join(f"{p} {1e3 * s:.0f} ms" for p, s in seconds.items()) + " for two layers")
        job = replace_train(job, precision=best)
    if train.compile == "auto" and (pair := excluded(replace_train(job, compile="on"))):
        say(f"compile off: {pair.reason}")
        job = replace_train(job, compile="off")
    elif train.compile == "auto":
        job = replace_train(job, compile="on" if _compiling_pays(job, mesh, batch, len(batches), say) else "off")
    return job


def cadences(job: Job) -> Job:
    """The job with how often it validates and saves, of a number of steps that is known."""
    steps = job.train.steps
    job = replace_train(job, validate_every=job.train.validate_every or max(1, steps // 10))
    return replace(job, checkpoint=replace(job.checkpoint, every=job.checkpoint.every or max(1, steps // 5)))


def _compiling_pays(job: Job, mesh: Mesh, batch: Batch, per_step: int, say: Callable[[str], None]) -> bool:
    if mesh.device.type == "cpu" and not shutil.which("g++") and not shutil.which("clang++"):
        say("compile off: no C++ compiler (g++) on this machine")
        return False
    eager = mesh.largest(_probe(replace_train(job, compile="off"), batch)[0])
    depth = job.model.num_hidden_layers / _PROBE_LAYERS
    length = 60 * job.train.minutes if not job.train.steps else eager * depth * per_step * job.train.steps
    if length < _TRY_COMPILE:
        say(f"compile off: the run is too short to repay it (about {length:.0f} s)")
        return False
    seconds, compiling = _probe(replace_train(job, compile="on"), batch)
    compiled, cost = mesh.largest(seconds), mesh.largest(compiling)
    gain = length * (1 - compiled / eager)
    say(
        f"compile {'on' if gain > cost else 'off'}: {1e3 * eager:.0f} ms eager, {1e3 * compiled:.0f} ms compiled for "
        f"two layers, {cost:.0f} s to compile, run of about {length:.0f} s"
    )
    return gain > cost


def _probe(job: Job, batch: Batch) -> tuple[float, float]:
    """(seconds of forward and backward of a shallow copy of the model, seconds until the first one had ended)."""
    options = replace(job.model, num_hidden_layers=min(_PROBE_LAYERS, job.model.num_hidden_layers))
    where = batch.tokens_BL.device
    with where:
        model = build(options).to(stored(job.train.precision))
    fills = parameters(options)
    for name, p in canonical(model):
        initialise_(p.data, name, tuple(p.shape), (0,) * p.ndim, fills[name].fill, job.train.seed)
    if job.train.compile == "on":
        for block in model.blocks:
            block.compile()
    objective = Objective(job.train.precision, job.train.loss_chunk)

    def once() -> float:
        start = time.perf_counter()
        objective(model, batch)[0].backward()
        device.synchronize(where)
        return time.perf_counter() - start

    first = once()
    once()
    return min(once() for _ in range(4)), first


def replace_train(job: Job, **changes: Any) -> Job:
    return replace(job, train=replace(job.train, **changes))
