"""One step of a run, watched: what every rank did when, written for Perfetto.

Spans are taken around what computes and what waits, by replacing these functions while the step lasts: so the rest of
the code knows nothing of tracing, and it costs nothing in all other steps. Whoever waits for a collective or a
neighbour waits in `Work.wait`, be it shoal, fully_shard or a pipeline's schedule. What travels meanwhile: `flights`.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage

from shoal import device
from shoal.mesh import Mesh
from shoal.observe import perfetto, timeline, trace
from shoal.observe.trace import Tracer
from shoal.optim.update import Update
from shoal.training.flights import Flights, Method, replaced
from shoal.training.objective import Objective

# Seconds in which the other ranks' spans must have come; they have ended the same step.
_PATIENCE = timedelta(seconds=60)


@contextmanager
def traced(mesh: Mesh, folder: Path) -> Iterator[Tracer]:
    """Records what this rank does inside. At the end rank 0 writes `folder`/trace.json for all; all ranks call it.

    An OSError of the file is raised on rank 0.
    """
    tracer = Tracer(mesh.rank)
    with ExitStack() as watched:
        watched.enter_context(Flights(tracer, mesh).within())
        for owner, name, span in _watched(tracer, mesh):
            waits_for = None if owner is dist.Work else mesh.device
            watched.enter_context(replaced(owner, name, functools.partial(_around, span, waits_for)))
        tracer.on = True
        yield tracer
        tracer.on = False
    key = f"trace-{mesh.view.number}"
    mesh.seat.store.set(f"{key}-{mesh.rank}", trace.encode(tracer.take()).decode())
    if mesh.rank == 0:
        keys = [f"{key}-{rank}" for rank in range(mesh.world)]
        mesh.seat.store.wait(keys, _PATIENCE)
        recordings = [trace.decode(mesh.seat.store.get(name)) for name in keys]
        perfetto.write(folder / perfetto.FILE, timeline.merged(recordings))


Spanning = Callable[..., AbstractContextManager[None]]
"""(arguments of the function) -> the span around its call."""


def _watched(tracer: Tracer, mesh: Mesh) -> list[tuple[Any, str, Spanning]]:
    pipeline = mesh.layout.pipeline > 1
    count: dict[str, int] = defaultdict(int)

    def plain(name: str, kind: trace.Kind) -> Spanning:
        """Micro-batches one after the other; in a pipeline the stage's spans are around these."""

        def span(*_: Any, **__: Any) -> AbstractContextManager[None]:
            count[name] += 1
            return tracer.span(name, kind, micro_batch=None if pipeline else count[name] - 1)

        return span

    def of_stage(name: str, kind: trace.Kind) -> Spanning:
        return lambda stage, chunk, *_, **__: tracer.span(name, kind, stage.stage_index, chunk)

    def wait(*_: Any, **__: Any) -> AbstractContextManager[None]:
        # Between its turns a stage waits for its neighbours' work, then for the network: `timeline.merged` tells when.
        return tracer.span("wait", "wait" if pipeline and tracer.depth == 0 else "communication")

    return [
        (dist.Work, "wait", wait),
        (Objective, "__call__", plain("forward", "forward")),
        (Tensor, "backward", plain("backward", "backward")),
        (PipelineStage, "forward_one_chunk", of_stage("forward", "forward")),
        (PipelineStage, "backward_one_chunk", of_stage("backward", "backward")),
        (PipelineStage, "backward_weight_one_chunk", of_stage("weight gradients", "backward")),
        (Update, "apply", plain("optimizer", "optimizer")),
    ]


def _around(span: Spanning, where: torch.device | None, function: Method) -> Method:
    """Every call of it in a span, at whose end what is queued on that device is done."""

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        with span(*args, **kwargs):
            value = function(*args, **kwargs)
            if where is not None:
                device.synchronize(where)
            return value

    return watched
