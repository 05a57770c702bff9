"""Ranks that look at what tracing replaces, and at the order in which things begin."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.models.decoder import Block
from shoal.observe import trace
from shoal.observe.trace import Tracer
from shoal.optim.update import Update
from shoal.training import flights, worker
from shoal.training.flights import Flights
from shoal.training.objective import Objective
from shoal.training.traced import traced


def before_and_after(seat: meshes.Seat) -> list[bool]:
    """[replaced inside, the very same functions afterwards]"""

    def functions():
        stage = (PipelineStage.forward_one_chunk, PipelineStage.backward_one_chunk)
        operations = (vars(dist.ProcessGroup)[name] for name in ("allreduce", "send", "recv", "_start_coalescing"))
        return vars(dist.Work)["wait"], *operations, Objective.__call__, torch.Tensor.backward, *stage, Update.apply

    mesh = meshes.build(Layout(replicas=2), seat, timeout=60)
    try:
        before = functions()
        with tempfile.TemporaryDirectory() as folder, traced(mesh, Path(folder)):
            inside = functions()
        return [all(a is not b for a, b in zip(before, inside, strict=True)), functions() == before]
    finally:
        mesh.close()


def message(seat: meshes.Seat) -> bytes:
    """A recording: rank 0 has begun to send before it computes, rank 1 begins to receive while both compute."""
    mesh = meshes.build(Layout(pipeline=2), seat, timeout=60)
    store = dist.PrefixStore("message", seat.store)
    try:
        tracer, group = Tracer(mesh.rank), mesh.group("pipeline")
        here, other, patience = f"{mesh.rank} computes", f"{1 - mesh.rank} computes", timedelta(seconds=60)
        tracer.on = True
        with Flights(tracer, mesh).within():
            x_D = torch.ones(4)
            if mesh.rank == 0:
                work = dist.isend(x_D, 1, group)
            with tracer.span("backward", "backward"):
                store.set(here, "")
                store.wait([other], patience)
                if mesh.rank == 1:
                    work = dist.irecv(x_D, 0, group)
                while not any(span.in_flight for span in tracer.spans):
                    time.sleep(0.001)
            work.wait()
        return trace.encode(tracer.take())
    finally:
        mesh.close()


def order(seat: meshes.Seat, **args: Any) -> list[str]:
    """Trains, and tells in which order gathers began, this rank waited for something, and blocks were called."""
    events: list[str] = []

    def told(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*those: Any, **named: Any) -> Any:
            events.append(name)
            return method(*those, **named)

        return call

    watched = [
        *((dist.ProcessGroup, name, "gather") for name in flights._METHODS["all_gather"]),
        *((dist.ProcessGroup, name, "reduce") for name in flights._METHODS["reduce_scatter"]),
        (dist.Work, "wait", "wait"),
        (Block, "forward", "block"),
        (torch.Tensor, "backward", "backward"),
        (Update, "apply", "update"),
    ]
    with ExitStack() as stack:
        for owner, name, event in watched:
            if name in vars(owner):
                stack.enter_context(flights.replaced(owner, name, partial(told, event)))
        worker.main(seat, **args)
    return events
