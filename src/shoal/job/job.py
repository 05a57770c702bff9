"""The job: everything that decides what a run computes, and where its files go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from shoal.errors import JobError
from shoal.job.check import fit, kinds, require
from shoal.job.checkpoint import CheckpointOptions
from shoal.job.data import DataOptions
from shoal.job.layout import Layout
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.run import RunOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions


@dataclass(frozen=True)
class Job:
    """layout × sync × recipe. Read with `shoal.job.read`, run with `shoal.train`."""

    layout: Layout | None = None
    """How the model is laid over ranks, e.g. `replicas=2,fsdp=2`; further keys: `zero` (1, 2 or 3),
    `micro_batch`, `recompute` (none or block). `auto` = one replica per GPU, or on CPU per core (as many, up
    to 8, as divide the global batch)."""
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    sync: SyncOptions = field(default_factory=SyncOptions)
    checkpoint: CheckpointOptions = field(default_factory=CheckpointOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def validate(self) -> Job:
        """This job, each option checked, and those that depend on each other; to be used in its place. Raises JobError.

        What was written more freely has become what it means: a layout's text a Layout, a single source a tuple.
        """
        tables = {name: _fitted(name, part) for name, part in parts(self)}
        job = replace(self, layout=_layout(self.layout), **tables)
        for _, part in parts(job):
            part.validate()
        if not job.model.weights:  # with weights, once their folder has been read: models.config.architecture
            check_context(job)
        if job.layout is not None:
            job.layout.validate()
            check_batch(job.train.global_batch, job.layout)
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
    """Sequences fit into the context that the model declares. Raises JobError that says what would do."""
    length, context = job.data.sequence_length, job.model.max_position_embeddings
    shorter = f"data.sequence_length={context} or less"
    require(
        length <= context,
        f"data.sequence_length={length} is more than the model's context, model.max_position_embeddings={context}",
        f"take {shorter}" if job.model.weights else f"give --model.max-position-embeddings {length}, or take {shorter}",
    )


def check_batch(global_batch: int, layout: Layout) -> None:
    """Every rank gets the same number of sequences. Raises JobError that says which batch would do."""
    ranks = layout.world
    if global_batch % ranks:
        below, above = global_batch // ranks * ranks, (global_batch // ranks + 1) * ranks
        near = f"{below} or {above}" if below else f"{above}"
        raise JobError(
            f"train.global_batch={global_batch} is not divisible by the {ranks} workers of layout {layout}",
            fix=f"take train.global_batch={near}, or a number of workers that divides {global_batch}",
        )
    part = global_batch // ranks
    if layout.micro_batch and part % layout.micro_batch:
        fits = [m for m in range(1, part + 1) if part % m == 0]
        raise JobError(
            f"layout micro_batch={layout.micro_batch} does not divide the {part} sequences of a rank "
            f"(train.global_batch={global_batch} over {ranks} workers)",
            fix=f"take one of {', '.join(map(str, fits))}",
        )
