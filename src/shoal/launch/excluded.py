"""What `shoal.parallelize` refuses of a layout whatever the module is; docs/own-models.md lists it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from shoal.errors import LayoutError
from shoal.job import Layout
from shoal.job.fits import SPLIT_BACKWARD
from shoal.job.nearby import of_world


@dataclass(frozen=True)
class Excluded:
    """What a module that shoal does not know cannot have, why, and what to take instead."""

    what: str
    reason: str
    fix: str
    asked: Callable[[Layout], bool]


EXCLUDED = (
    Excluded(
        "context",
        "context shares positions, and nobody knows which dimensions of a module's tensors are positions",
        "fsdp, replicas, pipeline or tensor; or a model of shoal's own",
        lambda layout: layout.context > 1,
    ),
    Excluded(
        "expert",
        "expert shares experts, and nobody knows which parts of a module are experts",
        "fsdp, replicas, pipeline or tensor; or a model of shoal's own",
        lambda layout: layout.expert > 1,
    ),
    Excluded(
        "pipeline with tensor",
        "pipeline traces a module and tensor rewrites its layers: for your own model they exclude each other",
        "pipeline with fsdp, or tensor with fsdp",
        lambda layout: layout.pipeline > 1 and layout.tensor > 1,
    ),
    Excluded(
        "schedule=interleaved_zero_bubble, zbv or dualpipev",
        # Torch walks from a stage's inputs to its weights, and so loses those that no input reaches with a gradient.
        "these schedules compute gradients of inputs and of weights apart, which torch gets wrong in some graphs",
        "schedule=1f1b, interleaved, looped_bfs or gpipe",
        lambda layout: layout.pipeline > 1 and layout.schedule in SPLIT_BACKWARD,
    ),
    Excluded(
        "recompute=block without pipeline",
        "recompute counts blocks of shoal's own models, and is for your own model the stage of a pipeline",
        "torch.utils.checkpoint in the module's own forward",
        lambda layout: layout.recompute != "none" and layout.pipeline == 1,
    ),
    Excluded(
        "tensor_by=ring",
        "tensor_by=ring goes by the groups of matrices that shoal's own models gather positions for",
        "leave it out",
        lambda layout: layout.tensor_by != "gather",
    ),
    Excluded(
        "replica_share",
        "replica_share gives replicas unequal parts, and `share` cuts a batch of your own into equal ones",
        "leave it out",
        lambda layout: bool(layout.replica_share),
    ),
    Excluded(
        "stages",
        "stages counts blocks of shoal's own models",
        "leave it out: the graph is cut by cost",
        lambda layout: bool(layout.stages),
    ),
)
"""All that is refused of layouts; docs/own-models.md lists it, and a test compares the two."""


def refuse_excluded(layout: Layout) -> None:
    """LayoutError for the first of `EXCLUDED` that the layout asks for, with the nearest layout of as many ranks."""
    asked = next((excluded for excluded in EXCLUDED if excluded.asked(layout)), None)
    if asked is not None:
        near = of_as_many_ranks(layout, layout.world)
        raise LayoutError(asked.reason, where=f"layout {layout}", fix=f"layout {near} would do; or {asked.fix}")


def _pass(layout: Layout) -> None:
    if any(excluded.asked(layout) for excluded in EXCLUDED):
        raise LayoutError("excluded")


def of_as_many_ranks(layout: Layout, world: int) -> Layout:
    """The nearest layout of so many ranks that is not excluded."""
    return of_world(layout, world, _pass) or Layout(replicas=world)
