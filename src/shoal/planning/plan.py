"""What is asked of the search, and what it answers: layouts, each with what is predicted of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from shoal.errors import JobError
from shoal.job import Job
from shoal.job.layout import Layout
from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions
from shoal.planning.cluster import Cluster

if TYPE_CHECKING:
    from shoal.planning.shapes import Shape

RESTART = 600.0
"""Seconds: less than ten minutes for finding out what failed (Jiang et al. 2024, "MegaScale", section 6.3)."""
STORAGE = 0.12e9
"""Bytes/s of a device: 2 TB/s for 16,384 (Llama 3, 2024, section 3.3.1)."""

CALLED = {
    "compute": "computing", "tensor": "exchanges of the tensor and expert groups",
    "context": "exchanges of the context group",
    "fsdp": "gathering and scattering of fsdp", "bubble": "pipeline bubble",
    "messages": "messages of the pipeline", "data": "reducing of gradients", "optimizer": "the optimizer",
    "sync": "what replicas exchange",
    "products": "matrix products", "attention": "attention", "elements": "operations of each number by itself",
    "launch": "Python between operations", "exchange": "exchanges", "update": "the update",
}  # fmt: skip
"""What a part of a step is called in a sentence: of `step.PARTS`, and of `local.PARTS`."""


@dataclass(frozen=True)
class Plan:
    """One layout and what is predicted of it.

    layout: whole, so that a job can have it as it is. chunks: stages that a rank of its pipeline has, 1 without one.
    seconds: of a step; low, high: four in five measurements lie between. tokens_per_second: of all devices;
    per_device: of one. mfu: FLOPs of the model (none for what is computed again) over the devices' peak at the
    question's precision. memory: bytes on the fullest device by part, which add up to its total. capacity: bytes that
    a device has. parts: seconds by part, which add up to `seconds`. bubble, exposed: shares of the step in which a
    device waits for its pipeline, and for communication. limit: what the step's time is limited by. cost: of all
    devices for 1e9 tokens, in the cluster's currency; None without a price. days: to the token target; None without.
    Both as if nothing failed (`failures` says what it takes). staleness: updates between a worker's pull and its push.
    along: of a pipeline through several pools their names in its order, and of each its ranks of the pipeline.
    """

    layout: Layout
    chunks: int
    seconds: float
    low: float
    high: float
    tokens_per_second: float
    per_device: float
    mfu: float
    memory: Mapping[str, float]
    capacity: float
    parts: Mapping[str, float]
    bubble: float
    exposed: float
    limit: str
    cost: float | None
    days: float | None
    staleness: float = 0.0
    along: tuple[tuple[str, int], ...] = ()

    @property
    def total(self) -> float:
        """Bytes on the fullest device."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Question:
    """sequence: tokens of one. global_batch: sequences of a step. precision: bf16, fp16, fp32 or fp8. stack: of
    `stacks.STACKS`. tokens: how many to train on, None if not told. restart: seconds from a failure to the first step
    after it. storage: bytes/s that one device writes of a checkpoint, while all do. sync, server: how replicas agree.
    replicas: how many, 0 = whichever are fastest."""

    shape: Shape
    cluster: Cluster
    sequence: int
    global_batch: int
    precision: str = "bf16"
    stack: str = "shoal"
    tokens: float | None = None
    restart: float = RESTART
    storage: float = STORAGE
    sync: SyncOptions = field(default_factory=SyncOptions)
    server: ServerOptions = field(default_factory=ServerOptions)
    replicas: int = 0


@dataclass(frozen=True)
class Answer:
    """plans: the best first. seconds: that the search took. candidates: layouts that there are; compared: of them those
    that had to be computed in full. nearest: where none fits, the one that is least too large. more: whether others fit
    that are not among the plans."""

    plans: tuple[Plan, ...]
    seconds: float
    candidates: int
    compared: int
    nearest: Plan | None
    more: bool = False


def why(first: Plan, second: Plan) -> str:
    """One sentence: the parts of a step of which the better plan saves most against the other one, and the one of which
    it needs most more; as many as are needed to come to half of the difference."""
    called = CALLED | {"tensor": f"exchanges of the {_cutting(first.layout, second.layout)}"}
    saved = {name: second.parts.get(name, 0.0) - first.parts.get(name, 0.0) for name in {**first.parts, **second.parts}}
    part, *further = sorted(saved, key=lambda name: -saved[name])
    one, other = brief(first.layout), brief(second.layout)
    if saved[part] <= 0:
        return f"{one} wins over {other} because it is simpler, at a step that is no slower"
    difference = second.seconds - first.seconds
    beginning = f"{one} wins over {other} because it spends {_told(saved[part])} less of a step on {called[part]}"
    if difference <= 0:
        return f"{beginning}, and is simpler at about the same step time"
    lost, sum_ = min(saved, key=lambda name: saved[name]), saved[part]
    for name in further:
        if sum_ + min(0.0, saved[lost]) >= difference / 2 or saved[name] <= 0:
            break
        beginning += f" and {_told(saved[name])} less on {called[name]}"
        sum_ += saved[name]
    if saved[lost] < -0.1 * saved[part]:
        beginning += f", though {_told(-saved[lost])} more on {called[lost]}"
    return f"{beginning}; the step takes {_told(difference)} less"


def _cutting(*layouts: Layout) -> str:
    """`tensor group`, `expert group`, or both, as far as one of them has it."""
    tensor, expert = (max(getattr(layout, axis) for layout in layouts) > 1 for axis in ("tensor", "expert"))
    return "tensor and expert groups" if tensor and expert else "expert group" if expert else "tensor group"


def brief(layout: Layout) -> str:
    """For a sentence: without what is a number for each stage or replica."""
    return str(replace(layout, stages="", replica_share=""))


def refused(job: Job, layout: Layout) -> JobError | None:
    """Why the job cannot have the layout."""
    try:
        replace(job, layout=layout).validate()
    except JobError as error:
        return error
    return None


def unlike(plans: Sequence[Plan]) -> list[Plan]:
    """Of those that differ in nothing but schedule, stages, shares or micro-batch the first."""
    first: dict[Layout, Plan] = {}
    for plan in plans:
        usual = replace(plan.layout, micro_batch=0, schedule="1f1b", stages="", replica_share="")
        first.setdefault(usual, plan)
    return list(first.values())


# Predictions do not tell steps apart that differ by less: rows of the best-fitted stack are off by more.
_CLOSE = 0.03


def simpler(plans: Sequence[Plan]) -> tuple[int, Plan] | None:
    """Of the plans behind the first the fastest that has no pipeline where that one has, or fewer axes, and is hardly
    slower; with its place, from 0."""
    best = plans[0]
    close = [(at, plan) for at, plan in enumerate(plans) if plan.seconds <= best.seconds * (1 + _CLOSE)]
    return next((found for found in close if _axes(found[1].layout) < _axes(best.layout)), None)


def _axes(layout: Layout) -> tuple[bool, int]:
    """Whether there is a pipeline, and how many axes there are."""
    degrees = (
        layout.replicas, layout.pipeline, layout.fsdp, layout.context, layout.tensor, layout.expert,
    )  # fmt: skip
    return layout.pipeline > 1, sum(degree > 1 for degree in degrees)


def _told(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"
