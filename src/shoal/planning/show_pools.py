"""Of a plan on several pools: who computes how much, and whether one pool by itself would do better."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.planning import uneven
from shoal.planning.plan import Plan, Question
from shoal.planning.show import layout_of, seconds_of


def pools(question: Question, plan: Plan, alone: Sequence[tuple[str, Plan | None]]) -> str:
    """Of a plan on several pools: who computes how much, and whether each pool by itself would do better."""
    lines = _stages(plan) if plan.along else _shares(question, plan)
    for name, one in alone:
        told = "nothing fits" if one is None else f"{seconds_of(one.seconds)} a step, {layout_of(one.layout)}"
        lines.append(f"pool {name} alone: {told}")
    known = [(one.seconds, name) for name, one in alone if one is not None]
    if not known:
        return "\n".join([*lines, "No pool would do alone."])
    seconds, name = min(known)
    times = seconds / plan.seconds
    gain = f"Together they are {times:.2f} times as fast as {name} alone."
    worse = f"Take {name} alone: together they are slower, {times:.2f} times as fast."
    return "\n".join([*lines, gain if times > 1 else worse])


def _stages(plan: Plan) -> list[str]:
    """Of a pipeline through several pools."""
    lines, first, blocks = [], 0, plan.layout.blocks_per_stage
    of = "the pipeline" if plan.layout.replicas == 1 else "each replica's pipeline"
    for name, ranks in plan.along:
        last = first + ranks - 1
        numbered = f"ranks {first} to {last}" if last > first else f"rank {first}"
        lines.append(f"pool {name}: {numbered} of {of}, {sum(blocks[first : last + 1])} of {sum(blocks)} blocks")
        first = last + 1
    return lines


def _shares(question: Question, plan: Plan) -> list[str]:
    """Of replicas that each lie in one pool."""
    of_pools = uneven.shares(question, plan)
    whole = sum(sum(shares) for _, shares in of_pools)
    lines, first = [], 0
    for pool, shares in of_pools:
        last = first + len(shares) - 1
        numbered = f"replicas {first} to {last}" if last > first else f"replica {first}"
        lines.append(f"pool {pool.name}: {numbered}, {100 * sum(shares) / whole:.1f} % of the batch")
        first = last + 1
    return lines


def better_alone(best: Plan, alone: Sequence[tuple[str, Plan | None]]) -> str:
    """Of a layout that goes over several pools and is slower than one of them by itself."""
    faster = [(plan.seconds, name) for name, plan in alone if plan is not None and plan.seconds < best.seconds]
    if not faster:
        return ""
    seconds, name = min(faster)
    than = f"{seconds_of(seconds)} a step instead of {seconds_of(best.seconds)}"
    return f". It goes over all pools; {name} alone is faster: {than}"
