"""What a job takes on its own ranks, before its model is built: steps of a few blocks of it, and its single pieces.

All is cut as the layout cuts it, at its real widths and with real micro-batches; there is no optimizer. So no rank
needs more memory than its part of the training. All ranks call these together and get the same numbers.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from shoal import device
from shoal.data.batch import Batch
from shoal.job import Job
from shoal.mesh import Mesh
from shoal.parallel.stages import EMBEDDING, HEAD, kind
from shoal.training.parts import Axes, hidden_of, objective_of, part_of, spread

# Blocks without a pipeline: enough to outweigh what is measured with them, small for any machine.
_BLOCKS = 2
_REPEATS = 4


def shallow(job: Job) -> Job:
    """The job with two blocks, or with one in each stage of its pipeline.

    Where only some blocks have experts, so have as large a part of these, but at least one has them and one has not.
    """
    layout, model = job.layout, job.model
    assert layout is not None
    whole, dense = model.num_hidden_layers, model.first_k_dense_replace
    blocks = layout.stage_count if layout.pipeline > 1 else min(_BLOCKS, whole)
    if dense < whole:
        dense = min(-(-dense * blocks // whole), blocks - 1)
    stages = "+".join("1" * blocks) if layout.pipeline > 1 else ""
    # Weights are random: those of a folder are another depth's.
    model = replace(model, num_hidden_layers=blocks, first_k_dense_replace=dense, weights="")
    return replace(job, model=model, layout=replace(layout, stages=stages))


def step(job: Job, mesh: Mesh, batches: list[Batch]) -> tuple[float, float]:
    """(Seconds of forward and backward of these micro-batches in `shallow(job)`, of the first time that was done,
    with compiling). `job` has neither precision nor compile `auto`.

    What the ranks of a replica send to each other is in it, with a pipeline its bubble too; what replicas send is not.
    """
    taken = _step(shallow(job), mesh, batches)
    gc.collect()  # the model that was measured, before there is another
    return taken


def _step(job: Job, mesh: Mesh, batches: list[Batch]) -> tuple[float, float]:
    replica, objective = spread(job, mesh)
    replica.on_bucket(lambda *_: None)
    # Agreed each time, which also lets the ranks begin together.
    return _repeated(lambda: mesh.largest(_clock(mesh, lambda: replica.gradients(batches, objective))))


def of_replicas(job: Job, mesh: Mesh, batches: list[Batch]) -> list[float]:
    """Seconds that each replica takes for a sequence of a rank's in `shallow(job)`, forward and backward; of its
    slowest rank. As `step` otherwise: replicas that share a machine feel each other's load."""
    taken = _of_replicas(shallow(job), mesh, batches)
    gc.collect()  # the model that was measured, before there is another
    return taken


def _of_replicas(job: Job, mesh: Mesh, batches: list[Batch]) -> list[float]:
    replica, objective = spread(job, mesh)
    replica.on_bucket(lambda *_: None)
    count = sum(len(batch.sample_B) for batch in batches)

    def once() -> list[float]:
        return mesh.of_replicas(_clock(mesh, lambda: replica.gradients(batches, objective)) / count)

    once(), once()  # the second one still allocates
    return [min(each) for each in zip(*(once() for _ in range(_REPEATS)), strict=True)]


def pieces(job: Job, mesh: Mesh, batch: Batch) -> dict[str, float]:
    """Seconds of a micro-batch's forward and backward in embedding, a block of each kind, and norm, head and loss; by
    name, in this order, of the slowest rank. `job` has neither precision nor compile `auto`, but a pipeline.

    Embedding and head are measured by the ranks that hold them in training, those of the first and the last stage.
    Weights that fsdp shares are whole, as a pipeline has them for all of a step.
    """
    layout, model, last = mesh.layout, job.model, job.model.num_hidden_layers + 2
    # With a block more at either end, a single block comes without embedding and head; these are stages of no block.
    job = replace(
        job, model=replace(model, num_hidden_layers=last, first_k_dense_replace=model.first_k_dense_replace + 1)
    )
    blocks = {kind(model, layer): range(layer + 1, layer + 2) for layer in range(model.num_hidden_layers)}
    mine, axes = layout.stages_of(mesh.stage), Axes.of(job, mesh)
    found = {}
    for name, layers in {EMBEDDING: range(0), **blocks, HEAD: range(last, last)}.items():
        absent = (name == EMBEDDING and 0 not in mine) or (name == HEAD and layout.stage_count - 1 not in mine)
        found[name] = mesh.largest(0.0 if absent else _piece(job, layers, axes, mesh, batch))
        gc.collect()
    return found


def _piece(job: Job, layers: range, axes: Axes, mesh: Mesh, batch: Batch) -> float:
    module = part_of(job, layers, axes).module.to_empty(device=mesh.device)
    generator = torch.Generator(mesh.device).manual_seed(job.train.seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.normal_(std=job.model.initializer_range, generator=generator)
    hidden_BLD = None
    if layers.start > 0:
        like = hidden_of(job, batch)
        hidden_BLD = torch.randn(like.shape, dtype=like.dtype, device=mesh.device, generator=generator)
        hidden_BLD.requires_grad_()
    objective = objective_of(job, axes)

    def once() -> None:
        out, _ = objective(module, batch, hidden_BLD)
        out.backward(torch.ones_like(out))

    return _repeated(lambda: _clock(mesh, once))[0]


def _repeated(seconds: Callable[[], float]) -> tuple[float, float]:
    """(Least of some, the first one.) The second one still allocates."""
    first, _ = seconds(), seconds()
    return min(seconds() for _ in range(_REPEATS)), first


def _clock(mesh: Mesh, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    device.synchronize(mesh.device)
    return time.perf_counter() - start
