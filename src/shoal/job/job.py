"""The job: everything that decides what a run computes, and where its files go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from shoal.errors import JobError
from shoal.job.check import fit, kinds, require
from shoal.job.checkpoint import CheckpointOptions
from shoal.job.data import DataOptions
from shoal.job.fits import check_layout, check_model
from shoal.job.layout import Layout
from shoal.job.model import ModelOptions
from shoal.job.nearby import or_nearest
from shoal.job.online import check_growing
from shoal.job.optim import OptimOptions
from shoal.job.run import RunOptions
from shoal.job.server import ServerOptions, check_server
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions


@dataclass(frozen=True)
class Job:
    """layout × sync × recipe. Read with `shoal.job.read`, run with `shoal.train`."""

    layout: Layout | None = None
    """How the model is laid over ranks, e.g. `replicas=2,pipeline=2,tensor=2`: axes `replicas`, `pipeline`, `fsdp`,
    `context`, `tensor`, and `expert` within the last three; further keys: `zero` (1, 2 or 3), `micro_batch`,
    `schedule`, `stages`, `replica_share`, `context_by`, `tensor_by`, `recompute` (docs/layouts.md). `auto` = the
    fastest that is predicted for this machine, or one replica per GPU, or on CPU per core (as many, up to 8, as divide
    the global batch; docs/layouts.md)."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    sync: SyncOptions = field(default_factory=SyncOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    run: RunOptions = field(default_factory=RunOptions)

    @property
    def endless(self) -> bool:
        """It trains on a store that grows until it is asked to stop: it has no number of steps, `train.steps` is 0."""
        return self.data.grow and not self.train.steps

    def validate(self) -> Job:
        """This job, each option checked, and those that depend on each other; to be used in its place. Raises JobError.

        What was written more freely has become what it means: a layout's text a Layout, a single source a tuple.
        """
        tables = {name: _fitted(name, part) for name, part in parts(self)}
        job = replace(self, layout=_layout(self.layout), **tables)
        for _, part in parts(job):
            part.validate()
        if job.layout is not None:
            job.layout.validate()
        check_server(job)
        check_growing(job)
        if not job.model.weights:  # with weights, once their folder has been read: models.config.architecture
            check_context(job)
        if job.layout is not None:
            checks = _checks(job)[: 1 if job.model.weights else 2]
            job = replace(job, layout=or_nearest(job.layout, *checks))
        return job


def parts(job: Job) -> Iterator[tuple[str, Any]]:
    """The tables of a job, by name: model, data, optim, ..."""
    return ((f.name, getattr(job, f.name)) for f in fields(job) if f.name != "layout")


def _fitted(table: str, options: Any) -> Any:
    """The options of a table, each as its kind."""
    kind = get_type_hints(Job)[table]
    if not isinstance(options, kind):
        raise JobError(f"{table}={options!r} is not {kind.__name__}", fix=f"{table}={kind.__name__}(...)")
    known = kinds(kind)
    return replace(options, **{key: fit(f"{table}.{key}", getattr(options, key), known[key]) for key in known})


def _layout(layout: Any) -> Layout | None:
    if layout is None or isinstance(layout, Layout):
        return layout
    if not isinstance(layout, str):
        raise JobError(f"layout={layout!r} is not a layout", fix='e.g. "replicas=2"')
    return None if layout == "auto" else Layout.parse(layout)


def check_context(job: Job) -> None:
    """Sequences fit into the context that the model declares, and the model into the layout.

    Raises JobError or LayoutError that says what would do.
    """
    length, context = job.data.sequence_length, job.model.max_position_embeddings
    shorter = f"data.sequence_length={context} or less"
    require(
        length <= context,
        f"data.sequence_length={length} is more than the model's context, model.max_position_embeddings={context}",
        f"take {shorter}" if job.model.weights else f"give --model.max-position-embeddings {length}, or take {shorter}",
    )
    if job.layout is not None:
        or_nearest(job.layout, *reversed(_checks(job)))


def _checks(job: Job) -> tuple[Callable[[Layout], Any], Callable[[Layout], Any]]:
    """What a layout must pass: for the job's options and its batch, and for its model."""
    return (
        lambda layout: check_layout(replace(job, layout=layout)),
        lambda layout: check_model(job.model, job.data.sequence_length, layout),
    )
