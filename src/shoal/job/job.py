"""The job: everything that decides what a run computes, and where its files go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import reduce
from typing import Any

from shoal.errors import JobError
from shoal.job.check import fit, kinds
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
        """Checks every option and the pairs that depend on each other. Raises JobError; returns self."""
        for name, kind in kinds(Job).items():
            if name != "layout":
                fit(name, reduce(getattr, name.split("."), self), kind)
        for _, part in parts(self):
            part.validate()
        if self.layout is not None:
            self.layout.validate()
            check_batch(self.train.global_batch, self.layout)
        return self


def parts(job: Job) -> Iterator[tuple[str, Any]]:
    """The tables of a job, by name: model, data, optim, ..."""
    return ((f.name, getattr(job, f.name)) for f in fields(job) if f.name != "layout")


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
