"""An answer of the search as text: a ranked table, why the first wins, what limits it, where time and memory go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from shoal.job.layout import AXES, Layout
from shoal.observe.units import counted, short, si
from shoal.planning import failures, syncs
from shoal.planning.cluster import Pool
from shoal.planning.plan import Answer, Plan, Question, brief, simpler, why

_GIB = 2.0**30
# A layout of which this share of the memory or more is predicted to be used may not fit, or be slowed by its allocator.
_NEAR = 0.85
_COUNTS = (("T", 1e12), ("B", 1e9), ("M", 1e6))


def layout_of(layout: Layout) -> str:
    """Its axes and what is shared along them; the rest has columns of its own."""
    parts = [f"{axis}={n}" for axis in AXES if (n := getattr(layout, axis)) > 1] or ["replicas=1"]
    parts += [f"expert={layout.expert}"] if layout.expert > 1 else []
    parts += [f"zero={layout.zero}"] if layout.sharers > 1 else []
    parts += [f"context_by={layout.context_by}"] if layout.context > 1 and layout.context_by != "ring" else []
    return ",".join(parts)


def schedule_of(plan: Plan) -> str:
    """`–` without a pipeline; `interleaved ×4`: stages on each rank."""
    if plan.layout.pipeline == 1:
        return "–"
    return plan.layout.schedule + (f" ×{plan.chunks}" if plan.chunks > 1 else "")


def title(question: Question) -> str:
    """What is planned, in two lines."""
    shape, where = question.shape, question.cluster
    tokens = question.global_batch * question.sequence
    batch = f"a step of {counted(question.global_batch, 'sequence')} × {counted(question.sequence, 'token')}"
    devices = " + ".join(f"{pool.count:,} {pool.device.title}{_nodes(pool)}" for pool in where.pools)
    active = f" ({_large(shape.active)} a token)" if shape.active < shape.parameters else ""
    return (
        f"{shape.name}: {_large(shape.parameters)} parameters{active}, on {where.name}: {devices}\n"
        f"{batch} = {_large(tokens)} tokens, {question.precision}{_agreeing(question)}"
    )


def _nodes(pool: Pool) -> str:
    """How many of them are in a node, where there are several nodes, and what is between these."""
    if pool.per_node == pool.count:
        return ""
    rate = si(8 * pool.between.bandwidth, "bit/s")
    return f" ({pool.per_node} a node, {pool.between.kind} of {rate} each between nodes)"


def _agreeing(question: Question) -> str:
    """How replicas agree, where that is not by all-reduce of gradients as they are."""
    sync, server = question.sync, question.server
    if syncs.plain(question):
        return ""
    said = [f"sync {sync.name}"]
    if sync.name in ("local", "gossip"):
        said += [f"every {counted(sync.every, 'step')}"]
        said += [f"in {counted(sync.fragments, 'fragment')}"] if sync.fragments > 1 else []
        said += [f"{counted(sync.delay, 'step')} on their way"] if sync.delay else []
    if sync.name == "server":
        said += [f"{counted(server.shards, 'shard')}", server.mode]
        said += [f"every {counted(server.local_steps, 'step')}"] if server.local_steps > 1 else []
    said += [f"codec {sync.codec}"] if sync.codec not in ("none", "auto") else []
    return f"; {', '.join(said)}"


def table(question: Question, answer: Answer, width: int | None = None) -> str:
    """Of the plans, the best first; columns of which nothing is known are left out. Where it is wider than `width`
    characters, it is two: layouts, and what is predicted of them."""
    remembered = all(plan.memory for plan in answer.plans)
    columns: list[tuple[str, Callable[[Plan], str] | None]] = [
        ("layout", lambda p: layout_of(p.layout)),
        ("micro-batch", lambda p: str(p.layout.micro_batch or "whole")),
        ("schedule", schedule_of if any(p.layout.pipeline > 1 for p in answer.plans) else None),
        ("recompute", lambda p: p.layout.recompute),
        ("step", lambda p: seconds_of(p.seconds)),
        ("80 %", lambda p: f"{seconds_of(p.low)} to {seconds_of(p.high)}"),
        ("tok/s/device", lambda p: _three(p.per_device)),
        ("MFU %", lambda p: f"{100 * p.mfu:.1f}"),
        ("GiB", (lambda p: _three(p.total / _GIB)) if remembered else None),
        ("free %", (lambda p: f"{100 * (1 - p.total / p.capacity):.0f}") if remembered else None),
        ("bubble %", lambda p: f"{100 * p.bubble:.1f}"),
        ("exposed %", lambda p: f"{100 * p.exposed:.1f}"),
        ("cost/1e9", _known(answer, "cost")),
        ("days", _known(answer, "days")),
    ]
    kept = [(name, cell) for name, cell in columns if cell is not None]
    rows = [[name for name, _ in kept], *([cell(plan) for _, cell in kept] for plan in answer.plans)]
    ranks = ["#", *(str(n) for n, _ in enumerate(answer.plans, 1))]
    whole = _aligned([[rank, *row] for rank, row in zip(ranks, rows, strict=True)], left=1)
    if width is None or whole.index("\n") <= width:
        return whole
    cut = next(n for n, (name, _) in enumerate(kept) if name == "step")
    figures = _aligned([[rank, *row[cut:]] for rank, row in zip(ranks, rows, strict=True)], left=None)
    layouts = _aligned([[rank, *row[:cut]] for rank, row in zip(ranks, rows, strict=True)], left=1)
    return f"{figures}\n\n{layouts}"


def _known(answer: Answer, name: str) -> Callable[[Plan], str] | None:
    """A column, where all plans have a value."""
    if any(getattr(plan, name) is None for plan in answer.plans):
        return None
    return lambda plan: _three(getattr(plan, name))


def remarks(question: Question, answer: Answer) -> str:
    """Below the table: why the first wins, what limits it, what the columns mean, and what is not told."""
    best = answer.plans[0]
    found = [f"{why(best, other)}." for other in answer.plans[1:2]]
    found += [] if found or answer.more else ["No other layout fits."]
    if easier := simpler(answer.plans):
        found.append(_easier(best, *easier))
    found.append(f"What limits it: {best.limit}.")
    if best.total > _NEAR * best.capacity:
        found.append(
            f"Its memory is nearly full ({100 * best.total / best.capacity:.0f} % predicted): what its allocator does "
            "near the end is not predicted, and slows steps down."
        )
    found.append(_mfu(question, best))
    if question.cluster.price is None:
        found.append("No cost: the cluster has no price (--price, or `price` of a pool in its file; of a device-hour).")
    elif best.cost is not None:
        of = (
            f"for {_large(question.tokens)} tokens: {_three(best.cost * question.tokens / 1e9)}"
            if question.tokens
            else ""
        )
        found.append(f"cost/1e9: of all devices for 1e9 tokens, in the currency of the price; {of}".rstrip("; ") + ".")
    found.append(_failing(question, best))
    found += _unlike(question, best)
    found.append(
        f"The fastest of {answer.candidates:,} layouts, of those that would fit if they took a tenth more memory; "
        f"found in {short(answer.seconds)}. Columns: docs/planning.md."
    )
    return "\n".join(found)


def _easier(best: Plan, at: int, plan: Plan) -> str:
    slower = max(0.0, plan.seconds / best.seconds - 1)
    without = "has no pipeline" if best.layout.pipeline > plan.layout.pipeline == 1 else "has fewer axes"
    return (
        f"{at + 1}, {layout_of(plan.layout)}, {without} and is predicted {100 * slower:.1f} % slower, less than "
        "what predictions tell apart."
    )


def _unlike(question: Question, plan: Plan) -> list[str]:
    """What another sync than all-reduce changes beside time."""
    if syncs.plain(question):
        return []
    found = "Another sync, or a codec, learns otherwise from the same tokens: how much that costs is not predicted."
    if plan.layout.replicas == 1 and question.sync.name != "server":
        return [f"{found} The fastest layout has one replica, which exchanges nothing: --replicas 2 plans two."]
    if plan.staleness:
        found += f" A gradient is {plan.staleness:,.0f} updates old when it is applied, where workers are equally fast."
    most = question.server.max_staleness
    if 0 <= most < plan.staleness:
        found += f" server.max_staleness={most} would reject most of them."
    return [found]


def _failing(question: Question, plan: Plan) -> str:
    """What failures make of the first plan's days and cost."""
    found = failures.expected(question)
    if found is None:
        silent = [pool for pool in question.cluster.pools if pool.mtbf is None]
        whose = "its devices" if len(silent) == len(question.cluster.pools) else f"those of pool {silent[0].name}"
        return f"No failures: the cluster does not say how often {whose} fail (`mtbf` of a pool in its file)."
    often = f"a device fails every {_while(found.mtbf)}, a restart takes {_while(found.restart)}"
    if found.shares is None:
        return f"With failures: no run would get on, where {often}."
    shares, days, cost = found.shares, found.days(plan), found.cost(plan)
    said = [f"{100 * shares.training:.1f} % of the time is training that counts"]
    said += [f"{_three(days)} days in all"] if days is not None else []
    said += [f"{_three(cost)} for 1e9 tokens"] if cost is not None else []
    saved = f"a checkpoint of {_three(found.size / 1e9)} GB takes {_while(found.stall)} every {_while(shares.interval)}"
    return f"With failures: {', '.join(said)}, where {often}, and {saved}."


def _mfu(question: Question, plan: Plan) -> str:
    """Its formula and peak."""
    each, devices = question.shape.flops_per_token(question.sequence), question.cluster.count
    if not plan.mfu:
        return "No MFU: it is not predicted."
    peak = each * plan.tokens_per_second / (devices * plan.mfu)
    return (
        f"MFU = tokens/s × {si(each, 'FLOP')} a token (forward and backward; computing again does not count) "
        f"÷ ({counted(devices, 'device')} × {si(peak, 'FLOP/s')}, "
        f"the {question.precision} peak in the catalogue or the cluster's file).{_instead(question)}"
    )


def _instead(question: Question) -> str:
    """Of a device that has no peak in the precision: which one stands for it."""
    others = [p.device for p in question.cluster.pools if question.precision not in p.device.peak]
    if not others:
        return ""
    has = next(name for name in ("bf16", "fp16", "fp32") if name in others[0].peak)
    return f" No {question.precision} is known of {others[0].name}: its {has} peak stands for it."


def explained(plan: Plan, number: int) -> str:
    """Where a plan's time and memory go, largest first."""
    parts = {name: part for name, part in plan.parts.items() if part > 1e-6 * plan.seconds}
    time = [[name, seconds_of(part), f"{100 * part / plan.seconds:.1f} %"] for name, part in _largest(parts)]
    memory = [
        [name, f"{_three(part / _GIB)} GiB", f"{100 * part / plan.capacity:.1f} %"]
        for name, part in _largest(plan.memory)
    ]
    total = [["together", seconds_of(plan.seconds), "100 %"]]
    full = [["together", f"{_three(plan.total / _GIB)} GiB", f"{100 * plan.total / plan.capacity:.1f} %"]]
    return (
        f"{number}: {plan.layout}\n"
        f"limited by {plan.limit}\n\n"
        f"a step\n{_aligned(time + total, left=0)}\n\n"
        f"memory of the fullest device, of {_three(plan.capacity / _GIB)} GiB\n{_aligned(memory + full, left=0)}"
    )


def compared(before: Answer, after: Answer) -> str:
    """Of two clusters, the best plans."""
    one, other = before.plans[0], after.plans[0]
    rate = other.tokens_per_second / one.tokens_per_second
    text = f"{seconds_of(one.seconds)} -> {seconds_of(other.seconds)} a step: {rate:.2f} times the tokens/s"
    text += f", {other.per_device / one.per_device:.2f} times a device's"
    if one.cost and other.cost:
        text += f", {other.cost / one.cost:.2f} times the cost of a token"
    moved = "the same layout" if one.layout == other.layout else f"{brief(one.layout)} -> {brief(other.layout)}"
    return f"{text}; {moved}."


def result(question: Question, answer: Answer) -> dict[str, Any]:
    """For scripts: docs/planning.md says what each key is."""
    failing = failures.expected(question)
    return {
        "seconds": answer.seconds, "candidates": answer.candidates, "compared": answer.compared,
        "failures": None if failing is None else failing.told(),
        "plans": [_plan(plan, failing) for plan in answer.plans],
    }  # fmt: skip


def told(question: Question, plan: Plan) -> dict[str, Any]:
    """Of one plan, for scripts."""
    return _plan(plan, failures.expected(question))


def _plan(plan: Plan, failing: failures.Expected | None) -> dict[str, Any]:
    layout = plan.layout
    return {
        "layout": str(layout), "micro_batch": layout.micro_batch,
        "schedule": layout.schedule if layout.pipeline > 1 else "",
        "recompute": layout.recompute, "chunks": plan.chunks, "step_seconds": plan.seconds, "low_seconds": plan.low,
        "high_seconds": plan.high, "tokens_per_second": plan.tokens_per_second,
        "tokens_per_second_per_device": plan.per_device, "mfu": plan.mfu, "memory_gib": plan.total / _GIB,
        "capacity_gib": plan.capacity / _GIB, "margin": 1 - plan.total / plan.capacity, "bubble": plan.bubble,
        "exposed": plan.exposed, "limit": plan.limit, "staleness": plan.staleness, "along": dict(plan.along),
        "cost_per_1e9_tokens": plan.cost, "days": plan.days,
        "cost_per_1e9_tokens_with_failures": None if failing is None else failing.cost(plan),
        "days_with_failures": None if failing is None else failing.days(plan),
        "parts_seconds": dict(plan.parts), "parts_gib": {name: part / _GIB for name, part in plan.memory.items()},
    }  # fmt: skip


def _large(count: float) -> str:
    """`8.03 B`, as parameters and tokens are counted."""
    found = next(((suffix, scale) for suffix, scale in _COUNTS if count >= scale), None)
    return f"{count / found[1]:.3g} {found[0]}" if found else f"{count:,.0f}"


def _largest(parts: Any) -> list[tuple[str, float]]:
    """Those that are there, the largest first."""
    return sorted(((name, part) for name, part in parts.items() if part), key=lambda item: -item[1])


def seconds_of(value: float) -> str:
    return f"{value:,.0f} s" if value >= 1000 else short(value)


def _while(seconds: float) -> str:
    """`3.1 h`, `10 min`, `2.4 s`."""
    known = ((86400, "days"), (3600, "h"), (60, "min"))
    return next((f"{_three(seconds / of)} {unit}" for of, unit in known if seconds >= of), short(seconds))


def _three(value: float) -> str:
    """Three digits, never as a power of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _aligned(rows: Sequence[Iterable[str]], left: int | None) -> str:
    """Columns as wide as they need, to the right but for that one."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: list[str]) -> str:
        aligned = (c.ljust(w) if n == left else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(aligned).rstrip()

    return "\n".join(map(line, cells))
