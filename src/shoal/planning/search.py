"""The fastest layouts of a dense model on a cluster of one kind of device, by trying all: replicas × pipeline (1F1B) ×
fsdp × tensor, micro-batches, ZeRO stages, recomputation. Contexts, experts and other schedules are not tried."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from shoal.errors import JobError
from shoal.job import Job, Layout
from shoal.job.check import require
from shoal.job.fits import check_layout, check_model
from shoal.job.model import ModelOptions
from shoal.planning import constants, memory, score, stacks, step, work
from shoal.planning.plan import Answer, Plan, Question
from shoal.planning.stacks import Stack
from shoal.planning.work import Array, Work

# A layout fits where so many times the prediction is no more than the device has.
SPARE = 1.10
# Of the micro-batch in sequences, and of the pipeline and tensor group in ranks.
_MICRO, _PIPELINE, _TENSOR = 16, 128, 8
# Steps that differ by less count as equal.
_EQUAL = 0.005
# Plans that are ranked.
_MOST = 100


def search(question: Question, best: int = 10) -> Answer:
    """At most `best` plans, the fastest first. JobError for what is not tried: experts, several kinds of devices."""
    begin = time.perf_counter()
    pools, shape = question.cluster.pools, question.shape
    require(len(pools) == 1, "clusters of several pools are not planned yet", "describe one pool, e.g. h100x64")
    require(not shape.experts, f"{shape.name} has experts: such models are not planned yet", "a dense model")
    layouts = [layout for layout in _layouts(question) if _allowed(question, layout)]
    if not layouts:
        return Answer((), time.perf_counter() - begin, 0, 0, None)
    stack = stacks.STACKS[question.stack]
    candidates = _work(question, stack, layouts)
    known = constants.load()
    found, kept = step.cost(candidates, known), memory.cost(candidates)
    total = kept.total("device")
    fits = total * SPARE <= pools[0].device.memory
    wide = np.sqrt(score.ROW**2 + score.TABLE**2 + score.DEVICE**2 + score.STACK**2) * np.ones(1)

    def plan(number: int) -> Plan:
        parts = {name: float(part[number]) for name, part in found.parts.items()}
        of_memory = {name: float(part[number]) for name, part in kept._asdict().items()}
        of_memory["beside"] = float(total[number]) - sum(of_memory.values())
        return _plan(question, layouts[number], float(found.seconds[number]), parts, of_memory, wide)

    chosen = _ranked(layouts, found.seconds, fits)[:best]
    nearest = None if chosen else plan(int(total.argmin()))
    plans = tuple(plan(number) for number in chosen)
    return Answer(plans, time.perf_counter() - begin, len(layouts), int(fits.sum()), nearest)


def _layouts(question: Question) -> Iterator[Layout]:
    pool = question.cluster.pools[0]
    for tensor in _divisors(pool.count, min(_TENSOR, pool.per_node)):
        for pipeline in _divisors(pool.count // tensor, min(_PIPELINE, question.shape.layers)):
            data = pool.count // tensor // pipeline
            if question.global_batch % data:
                continue
            each = question.global_batch // data
            for fsdp in _divisors(data, data):
                for micro in _divisors(each, _MICRO):
                    for zero in (1, 2, 3) if fsdp > 1 else (3,):
                        plain = Layout(data // fsdp, "", pipeline, fsdp, tensor=tensor, zero=zero, micro_batch=micro)
                        yield plain
                        yield replace(plain, recompute="block")


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, min(number, most) + 1) if number % n == 0]


def _allowed(question: Question, layout: Layout) -> bool:
    """By the rules that a job's layout has to pass."""
    shape, job = question.shape, Job()
    model = ModelOptions(
        hidden_size=shape.hidden, intermediate_size=shape.feed, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads, vocab_size=shape.vocab,
    )  # fmt: skip
    try:
        check_layout(replace(job, layout=layout, train=replace(job.train, global_batch=question.global_batch)))
        check_model(model, question.sequence, layout)
    except JobError:
        return False
    return True


def _work(question: Question, stack: Stack, layouts: list[Layout]) -> Work:
    pool = question.cluster.pools[0]
    same = {**question.shape.columns, **pool.columns, "sequence": question.sequence, "devices": pool.count}
    same |= {name: float(getattr(stack, name)) for name in work.STACK}
    same |= {"chunks": 1, "context": 1, "selective": 0, "global_batch": question.global_batch}
    same |= {"low": float(question.precision == "fp8")}
    rows = [
        same | {
            "tensor": one.tensor, "pipeline": one.pipeline, "data": one.readers, "fsdp": one.fsdp,
            "zero": one.zero if one.fsdp > 1 else 0, "shards": float(one.tensor > 1),
            "recompute": float(one.recompute == "block"), "micro_batch": one.micro_batch,
        }
        for one in layouts
    ]  # fmt: skip
    number = len(layouts)
    return work.of_rows(rows, [pool.device.name] * number, [stack.constants] * number)


def _ranked(layouts: list[Layout], seconds: Array, fits: np.ndarray) -> list[int]:
    """Those that fit, the fastest first; of those as fast as the fastest left, the simplest."""
    left = sorted(map(int, np.flatnonzero(fits)), key=lambda n: float(seconds[n]))
    found: list[int] = []
    while left:
        as_fast = [n for n in left if seconds[n] <= seconds[left[0]] * (1 + _EQUAL)]
        found.append(min(as_fast, key=lambda n: (_complexity(layouts[n]), float(seconds[n]))))
        left.remove(found[-1])
        if len(found) >= _MOST:
            break
    return found


def _complexity(layout: Layout) -> tuple[int, int, bool]:
    axes = sum(getattr(layout, axis) > 1 for axis in ("replicas", "pipeline", "fsdp", "tensor"))
    return axes, layout.tensor * layout.pipeline, layout.recompute != "none"


def _plan(
    question: Question, layout: Layout, seconds: float, parts: dict[str, float], kept: dict[str, float], wide: Array
) -> Plan:
    pool, price = question.cluster.pools[0], question.cluster.price
    (low,), (high,) = score.interval(wide)
    rate = question.global_batch * question.sequence / seconds
    peak = pool.device.peak.get(question.precision, pool.device.peak_16)
    waits = {name: parts.get(name, 0.0) for name in ("tensor", "fsdp", "messages", "data")}
    inside = {"tensor": layout.tensor, "fsdp": layout.tensor * layout.fsdp}
    most = max({**waits, "compute": parts["compute"], "bubble": parts["bubble"]}.items(), key=lambda item: item[1])[0]
    within = inside.get(most, pool.count) <= pool.per_node
    link = f"{pool.inside.kind} inside nodes" if within else f"{pool.between.kind} between nodes"
    return Plan(
        layout, 1, seconds, seconds * float(low), seconds * float(high), rate, rate / pool.count,
        question.shape.flops_per_token(question.sequence) * rate / pool.count / peak, kept, pool.device.memory, parts,
        parts["bubble"] / seconds, sum(waits.values()) / seconds,
        {"compute": "compute", "bubble": "pipeline bubble"}.get(most, link),
        None if price is None else price / 3600 / rate * 1e9,
        None if question.tokens is None else question.tokens / rate / 86400,
    )  # fmt: skip
