"""Can this model be laid out so, with these sequences and this batch? One sentence when not, with what would do.

Pairs of options that exclude each other whatever the sizes are in `EXCLUDED`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import gcd, isqrt, lcm
from typing import TYPE_CHECKING

from shoal.errors import JobError, LayoutError
from shoal.job.check import count
from shoal.job.layout import Layout
from shoal.job.model import ModelOptions
from shoal.job.server import pushed_batch
from shoal.job.shares import AUTO, check_list, grain, in_proportion, sequences, written

if TYPE_CHECKING:
    from shoal.job.job import Job


@dataclass(frozen=True)
class Excluded:
    """Two options that cannot be had together, why, and what to take instead."""

    one: str
    other: str
    reason: str
    fix: str
    both: Callable[[Job, Layout], bool]


SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")
"""Schedules that compute the gradients of inputs and of weights apart."""

EXCLUDED = (
    Excluded(
        "schedule=interleaved_zero_bubble, zbv or dualpipev",
        "train.compile=on",
        "these schedules compute gradients of inputs and of weights apart, a compiled block both at once",
        "schedule=interleaved, or train.compile=off",
        lambda job, layout: layout.pipeline > 1 and layout.schedule in SPLIT_BACKWARD and job.train.compile == "on",
    ),
    Excluded(
        "schedule=interleaved_zero_bubble, zbv or dualpipev",
        "recompute=block",
        "these schedules walk a block's backward graph twice, and recomputation frees it after the first time",
        "schedule=interleaved, or recompute=none",
        lambda job, layout: layout.pipeline > 1 and layout.schedule in SPLIT_BACKWARD and layout.recompute == "block",
    ),
    Excluded(
        "context",
        "train.attention_dropout",
        "this dropout needs the probabilities of a query for all keys of its row, which ring and Ulysses never make",
        "tensor or fsdp instead of context, or train.attention_dropout=0",
        lambda job, layout: layout.context > 1 and job.train.attention_dropout > 0,
    ),
    Excluded(
        "sync.name=local with a sync.codec other than bf16",
        "tensor, pipeline or experts on several ranks",
        "ranks of a replica that have the same weights would each decode others, with what lies beside them",
        "sync.codec=bf16, or fsdp or context instead",
        lambda job, layout: (
            job.sync.name == "local"
            and job.sync.codec not in ("none", "bf16", "auto")
            and max(layout.tensor, layout.pipeline, layout.ranks_per_replica if job.model.num_experts else 1) > 1
        ),
    ),
    Excluded(
        "sync.name=gossip",
        "replica_share",
        "there all replicas count alike: pairs take the plain mean",
        "another sync.name, or leave out replica_share",
        lambda job, layout: job.sync.name == "gossip" and bool(layout.replica_share),
    ),
)
"""All pairs that are refused; docs/layouts.md lists them, and a test counts them there."""


def check_layout(job: Job) -> Layout:
    """The job's layout with its micro-batch decided where a pipeline needs one.

    Raises LayoutError or JobError that says which numbers would do.
    """
    layout = job.layout
    assert layout is not None
    if pair := excluded(job):
        one = f"schedule={layout.schedule}" if pair.one.startswith("schedule=") else pair.one
        fix = _equal_shares(job, layout, pair) + pair.fix
        raise LayoutError(f"{one} excludes {pair.other}: {pair.reason}", fix=fix)
    check_list("sync.pace", job.sync.pace, layout.replicas)
    batch = pushed_batch(job)
    check_batch(batch, layout)
    if layout.pipeline > 1:
        layout = _with_micro_batch(batch, layout)
        check_batch(batch, layout)
    return layout


def _equal_shares(job: Job, layout: Layout, pair: Excluded) -> str:
    """As many replicas without shares, where they cannot have equal parts of the global batch: with another one."""
    equal = replace(layout, replica_share="")
    if pair.other != "replica_share" or job.train.global_batch % equal.pieces == 0:
        return ""
    return f"layout {equal} with train.global_batch={_nearest_multiple(job.train.global_batch, equal.pieces)}; or "


def excluded(job: Job) -> Excluded | None:
    """A pair of the job's options that cannot be had together."""
    layout = job.layout
    return None if layout is None else next((pair for pair in EXCLUDED if pair.both(job, layout)), None)


def check_model(model: ModelOptions, sequence_length: int, layout: Layout) -> None:
    """Heads, blocks and positions can be shared as the layout says. Raises LayoutError that says what would do."""
    check_tensor(model, layout)
    _check_sequence(model, sequence_length, layout)
    check_stages(model, layout)
    _check_experts(model, layout)


def check_batch(global_batch: int, layout: Layout) -> None:
    """Every reader of a replica gets the same number of sequences, and of all as many as its replica's share says.

    Raises JobError that says which batch would do.
    """
    if layout.replica_share == AUTO:
        _check_shareable(global_batch, layout)
        return
    readers, pieces = layout.readers, layout.pieces
    who = "workers" if readers == layout.world else "ranks along replicas and fsdp"
    if global_batch % pieces:
        parts = f"{readers} {who}" if pieces == readers else f"{pieces} pieces that replica_share × fsdp come to"
        raise JobError(
            f"train.global_batch={global_batch} is not divisible by the {parts} of layout {layout}",
            fix=f"take train.global_batch={_nearest_multiple(global_batch, pieces)}, or "
            + ("other shares" if layout.replica_share else f"a number of workers that divides {global_batch}"),
        )
    parts_R = [n // layout.fsdp for n in sequences(layout, global_batch)]
    if layout.micro_batch and (part := next((n for n in parts_R if n % layout.micro_batch), 0)):
        raise JobError(
            f"layout micro_batch={layout.micro_batch} does not divide the {count(part, 'sequence')} of a rank "
            f"(train.global_batch={global_batch} over {readers} {who})",
            fix=f"take {_list(_divisors(gcd(*parts_R)))}",
        )


def _check_shareable(global_batch: int, layout: Layout) -> None:
    """Whatever `auto` shares turn out to be, there are whole micro-batches for everybody."""
    size = grain(layout)
    fewest_of_all = _least(layout) * layout.replicas * size
    if global_batch % size or global_batch < fewest_of_all:
        raise JobError(
            f"train.global_batch={global_batch} cannot be shared in parts of {count(size, 'sequence')}, "
            f"{_least(layout)} or more for each replica of layout {layout}",
            fix=f"take train.global_batch={_nearest_multiple(max(global_batch, fewest_of_all), size)}",
        )


def _least(layout: Layout) -> int:
    """Of a replica, the fewest grains that its pipeline's schedule can run."""
    return -(-fewest(layout) * layout.fsdp * max(1, layout.micro_batch) // grain(layout))


def shared_out(global_batch: int, layout: Layout, speeds: Sequence[float]) -> Layout:
    """With `replica_share` by the speeds of its replicas, in any unit; for a batch that it has been checked for."""
    pieces = in_proportion(global_batch // grain(layout), speeds, _least(layout))
    return replace(layout, replica_share=written(pieces))


def _nearest_multiple(number: int, unit: int) -> str:
    below, rest = number - number % unit, number % unit
    return _list([n for n in ((below, below + unit) if rest else (number,)) if n])


def _with_micro_batch(global_batch: int, layout: Layout) -> Layout:
    """Enough micro-batches for the schedule. Without a size given, the largest that makes twice as many as stages."""
    parts_R = {n // layout.fsdp for n in sequences(layout, global_batch)}
    part = min(parts_R)
    good = [size for size in _divisors(gcd(*parts_R)) if all(enough(n // size, layout) for n in parts_R)]
    if not layout.micro_batch and good:
        wanted = [size for size in good if part // size >= 2 * layout.stage_count]
        return replace(layout, micro_batch=max(wanted) if wanted else min(good))
    if layout.micro_batch in good:
        return layout
    number = part // layout.micro_batch if layout.micro_batch else part
    what = f"schedule={layout.schedule} on {layout.pipeline} ranks with {layout.stage_count} stages"
    raise LayoutError(
        f"{what} cannot run {count(number, 'micro-batch')} ({count(part, 'sequence')} a pipeline)",
        fix=f"take micro_batch={_list(good)}" if good else f"train.global_batch={_fewest_sequences(layout)}",
    )


def _fewest_sequences(layout: Layout) -> int:
    """The smallest batch that is enough for the schedule on every replica."""
    return -(-fewest(layout) // min(layout.shares)) * layout.pieces * max(1, layout.micro_batch)


def enough(micro_batches: int, layout: Layout) -> bool:
    """Whether the schedule can run so many. What each schedule needs (torch.distributed.pipelining)."""
    if layout.schedule == "dualpipev":
        return micro_batches >= layout.stage_count
    if layout.schedule in ("interleaved", "interleaved_zero_bubble"):
        rounds = max(1, micro_batches // layout.pipeline)
        return micro_batches >= layout.pipeline and micro_batches % rounds == 0
    if layout.schedule == "1f1b":
        return micro_batches >= layout.pipeline
    return True


def fewest(layout: Layout) -> int:
    """The fewest micro-batches that are enough."""
    if layout.schedule == "dualpipev":
        return layout.stage_count
    return layout.pipeline if layout.schedule in ("1f1b", "interleaved", "interleaved_zero_bubble") else 1


def check_tensor(model: ModelOptions, layout: Layout) -> None:
    """Each rank gets whole heads; a key head may be on several ranks, but then on equally many."""
    ranks, heads, keys = layout.tensor, model.num_attention_heads, model.num_key_value_heads
    fits = [n for n in _divisors(heads) if keys % n == 0 or n % keys == 0]
    if ranks not in fits:
        raise LayoutError(
            f"layout tensor={ranks} does not divide {heads} query heads with {keys} key and value heads evenly",
            fix=f"tensor={_list(fits)}",
        )
    for name in ("vocab_size", "intermediate_size", "shared_expert_intermediate_size"):
        if 0 < getattr(model, name) < ranks:
            raise LayoutError(f"layout tensor={ranks} is more than model.{name}={getattr(model, name)}")


def _check_sequence(model: ModelOptions, length: int, layout: Layout) -> None:
    """Each rank gets as many positions as any other."""
    context, tensor = layout.context, layout.tensor
    # The ring deals out the row's chunks in pairs, an early one and a late one, so that causal work is even.
    unit = lcm(2 * context, tensor * context) if context > 1 and layout.context_by == "ring" else tensor * context
    if length % unit:
        near = [n for n in (length // unit * unit, (length // unit + 1) * unit) if n]
        raise LayoutError(
            f"data.sequence_length={length} cannot be shared by context={context}, tensor={tensor} ranks",
            fix=f"data.sequence_length={_list(near)} (multiples of {unit})",
        )
    if context > 1 and model.value_size > model.head_size:
        raise LayoutError(
            f"layout context={context} needs values no wider than keys, "
            f"and model.v_head_dim={model.value_size} is more than their {model.head_size} features",
            fix="fsdp or tensor instead of context",
        )
    if context == 1 or layout.context_by == "ring":
        return
    heads = model.num_attention_heads // tensor
    keys = max(1, model.num_key_value_heads // tensor)
    fits = [n for n in _divisors(heads) if keys % n == 0 or n % keys == 0]
    if context not in fits:
        raise LayoutError(
            f"context_by=ulysses gives each of context={context} ranks some heads, "
            f"but there are {count(heads, 'query head')} and {count(keys, 'key head')}"
            f"{' on each tensor rank' if tensor > 1 else ''}",
            fix=f"context={_list(fits)}, or context_by=ring",
        )


def check_stages(model: ModelOptions, layout: Layout) -> None:
    """There are blocks for all stages. Raises LayoutError that says what would do."""
    blocks, stages = model.num_hidden_layers, layout.stage_count
    if blocks < stages:
        raise LayoutError(
            f"layout pipeline={layout.pipeline},schedule={layout.schedule} has {stages} stages, "
            f"the model only {count(blocks, 'block')}"
        )
    given = layout.blocks_per_stage
    if given and sum(given) != blocks:
        raise LayoutError(
            f"layout stages={layout.stages} has {count(sum(given), 'block')}, the model {blocks}",
            fix="one number for each stage, together the model's blocks",
        )


def _check_experts(model: ModelOptions, layout: Layout) -> None:
    """Each rank gets equally many experts."""
    if layout.expert > 1 and not model.num_experts:
        raise LayoutError(f"layout expert={layout.expert} shares experts, and the model has none")
    if layout.expert > 1 and model.num_experts % layout.expert:
        sharing = layout.expert * layout.rest
        fits = [n for n in _divisors(sharing) if model.num_experts % n == 0]
        raise LayoutError(
            f"layout expert={layout.expert} does not divide model.num_experts={model.num_experts}",
            fix=f"expert={_list(fits)}",
        )


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})


def _list(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
