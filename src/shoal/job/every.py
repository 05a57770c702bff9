"""Every layout of a number of processes, and a job made small enough to try them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import gcd, lcm
from typing import Any

from shoal.errors import ShoalError
from shoal.job.fits import check_model
from shoal.job.job import Job
from shoal.job.layout import AXES, SCHEDULES, Layout
from shoal.job.model import ModelOptions
from shoal.job.shares import sequences

MOST_PROCESSES = 32
"""Of which `shoal check` tries layouts: of so many ranks there are thousands."""


def layouts(processes: int, experts: int = 0) -> list[Layout]:
    """Every product of axes that makes 2 to `processes` ranks.

    Alone and in pairs each axis has its kinds (`_kinds`), among three and more the first one, and a V schedule, which
    has both ends of the pipeline on one rank. experts: of the model; each product also with every number of ranks that
    can share them.
    """
    found = []
    for world in range(2, processes + 1):
        for degrees in _products(world, len(AXES)):
            axes: dict[str, Any] = {axis: n for axis, n in zip(AXES, degrees, strict=True) if n > 1}
            found += [replace(Layout(), **axes, **kind) for kind in _kinds(axes)]
            sharing = Layout(**axes).rest
            shared = [n for n in range(2, sharing + 1) if experts and sharing % n == 0 and experts % n == 0]
            found += [replace(Layout(), **axes, **_kinds(axes)[0], expert=n) for n in shared]
    return found


def _products(total: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (total,)
        return
    for first in (n for n in range(total, 0, -1) if total % n == 0):
        for rest in _products(total // first, count - 1):
            yield first, *rest


def _kinds(axes: dict[str, int]) -> list[dict[str, Any]]:
    """How these axes can be had: alone all schedules, all ways of context and tensor ranks to talk, and
    recomputation; up to two, all stages of ZeRO where there is something to share. The first kind is the usual one."""
    alone = len(axes) == 1
    kinds: list[dict[str, Any]] = [{}]
    if "pipeline" in axes:
        kinds = [{"schedule": schedule} for schedule in (SCHEDULES if alone else ("1f1b", "zbv"))]
    elif "context" in axes and alone:
        kinds = [{"context_by": kind} for kind in ("ring", "ulysses")]
    elif "tensor" in axes and alone:
        kinds = [{"tensor_by": kind} for kind in ("gather", "ring")]
    usual = kinds[0]
    if len(axes) <= 2 and ("fsdp" in axes or "context" in axes):
        kinds += [{**usual, "zero": zero} for zero in (2, 1)]
    return [*kinds, {**usual, "recompute": "block"}] if alone else kinds


def small(job: Job, processes: int, given: list[Layout]) -> Job:
    """The job, shrunk in depth, width, sequence and batch but not in structure: heads and how they share keys, experts
    and how tokens choose them, biases, norms, tying and vocabulary stay. For layouts `given`, of up to `processes`
    ranks."""
    deepest = max([2 * processes, *(layout.stage_count for layout in given)])
    blocks = job.model.num_hidden_layers
    if not any(layout.blocks_per_stage for layout in given):  # which count all blocks
        blocks = min(blocks, deepest)
    options = _narrow(replace(job.model, weights="", num_hidden_layers=blocks))
    unit = lcm(*(lcm(2 * layout.context, layout.context * layout.tensor) for layout in given))
    length = min(job.data.sequence_length, max(unit, 96 // unit * unit))
    job = replace(job, model=options, data=replace(job.data, sequence_length=length))
    # Each reader gets equally many sequences, in two micro-batches at least, and every schedule enough of them; four
    # in all can be computed in several ways on one process, which is what the noise of low precision is measured by.
    readers = lcm(*(layout.pieces * max(1, layout.micro_batch) for layout in given))
    batches = [_of_batch(job, n * readers) for n in range(2, 2 * deepest + 1) if n * readers >= 4]
    return next((each for each in batches if not any(refusal(each, layout) for layout in given)), batches[-1])


def _of_batch(job: Job, sequences: int) -> Job:
    return replace(job, train=replace(job.train, global_batch=sequences, compile="off"))


def _narrow(model: ModelOptions) -> ModelOptions:
    """Heads of 8 features, a residual stream of 32, layers of 48; experts of 16, from the second block on at least."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "shared_expert_intermediate_size": min(16, model.moe_intermediate_size or 16),
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    }  # fmt: skip
    changes = {name: min(getattr(model, name), most) for name, most in sizes.items() if hasattr(model, name)}
    return replace(model, **changes, head_dim=0 if model.kv_lora_rank else min(model.head_size, 8))


def refusal(job: Job, layout: Layout) -> str:
    """Why the job cannot have this layout, whatever its size; empty if it can."""
    try:
        validated = replace(job, layout=layout).validate()
        assert validated.layout is not None
        check_model(job.model, job.data.sequence_length, validated.layout)
    except ShoalError as error:
        return f"{error.what} ({error.fix})"
    return ""


def accumulated(job: Job, layout: Layout) -> Layout:
    """The layout with two micro-batches or more of the job's batch: those of a pipeline as it decides, else as few."""
    if layout.micro_batch or layout.pipeline > 1:
        return layout
    part = gcd(*sequences(layout, job.train.global_batch)) // layout.fsdp
    return replace(layout, micro_batch=max((size for size in range(1, part) if part % size == 0), default=0))
