"""Plans of one machine that `shoal calibrate` has measured: of its layouts, the fastest by what operations took there.

What another machine's ranks would add is in no table, so these are layouts of its own ranks alone.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, prod
from pathlib import Path

from shoal.errors import JobError, ShoalError
from shoal.job import Job, Layout
from shoal.job.check import at_least, require
from shoal.models import config
from shoal.observe.units import counted, short
from shoal.planning import asked, entry, kept, local, show
from shoal.planning.asked import Wanted
from shoal.planning.cluster import Cluster, Link, Pool
from shoal.planning.devices import Device
from shoal.planning.entry import Entry, Precision
from shoal.planning.local import Predicted
from shoal.planning.plan import CALLED, Answer, Plan, Question, refused, unlike, why

HERE = "here"
"""As a cluster's name: the machine that this runs on."""
EQUAL = 0.005
"""Layouts that differ by less are equal, and the simpler one is taken."""
PROCESS = 244 * 2**20
"""Bytes of a rank's process before it has built anything, on Linux with torch 2.13: measured, about; in a run, it is
that rank's."""
# Between these, times what was predicted, lay four in five of 33 steps that were measured (docs/benchmarks.md): nearly
# all took longer.
_LOW, _HIGH = 1.02, 1.45
# A layout fits where so many times the prediction is no more than there is.
_SPARE = 1.10


@dataclass(frozen=True)
class Ranked:
    """memory: bytes of the fullest rank by kept.PARTS, {} where they are not predicted."""

    layout: Layout
    step: Predicted
    memory: Mapping[str, float]


def machine(text: str) -> Entry | None:
    """Of what --cluster says: the entry of this machine (`here`), or the one in a file; None where it is a cluster."""
    if text == HERE:
        return entry.read(entry.home())
    return entry.read(text) if Path(text).is_file() and entry.is_one(text) else None


def settled(job: Job, known: Entry, most: int) -> Job:
    """With what a run of at most so many ranks would decide by itself: no codec on one machine, the faster precision;
    whether compiling pays is not known, so it is off."""
    train, sync = job.train, job.sync
    train = replace(train, compile="off" if train.compile == "auto" else train.compile)
    job = replace(job, train=train, sync=replace(sync, codec="none" if sync.codec == "auto" else sync.codec))
    if train.precision != "auto":
        return job
    jobs = [replace(job, train=replace(train, precision=precision)) for precision in ("fp32", "bf16")]
    return min(jobs, key=lambda one: _least(one, known, most))


def _least(job: Job, known: Entry, most: int) -> float:
    """Seconds of the fastest layout."""
    try:
        return ranked(job, known, most)[0].step.seconds
    except ShoalError:
        return inf


def ranked(job: Job, known: Entry, most: int, replicas: int = 0) -> list[Ranked]:
    """All layouts of at most so many ranks that the entry knows and its memory holds, the fastest first; of equal ones
    the simpler. job: settled. replicas: how many, 0 = whichever. JobError with the reason where there is none."""
    found: list[Ranked] = []
    reason: ShoalError | None = None
    for layout in layouts([side.ranks for side in known.sides if side.ranks <= most], job.train.global_batch):
        if replicas not in (0, layout.replicas):
            continue
        try:
            found.append(_one(replace(job, layout=layout), layout, known))
        except ShoalError as error:
            reason = reason or error
    if not found:
        raise reason or JobError(f"no layout has {replicas} replicas here", fix="--replicas 0: whichever are fastest")
    found.sort(key=lambda one: one.step.seconds)
    equal = [one for one in found if one.step.seconds <= found[0].step.seconds * (1 + EQUAL)]
    best = min(equal, key=lambda one: (_axes(one.layout), one.layout.micro_batch > 0, one.step.seconds))
    return [best, *(one for one in found if one is not best)]


def _one(job: Job, layout: Layout, known: Entry) -> Ranked:
    """Blocks are computed again where memory holds them in no other way. JobError where it does not even then."""
    each = _each(known, layout.world)
    for recompute in ("none", "block"):
        tried = replace(layout, recompute=recompute)
        step = local.predict(replace(job, layout=tried), known)
        memory = _memory(replace(job, layout=tried), known)
        total = sum(memory.values())
        if _SPARE * total <= each:
            return Ranked(tried, step, memory)
    what = f"{layout} needs {total / 2**30:.3g} GiB of a rank, and the machine has {each / 2**30:.3g} for each"
    raise JobError(what, fix="a smaller model, batch or sequence; or a larger machine")


def _each(known: Entry, world: int) -> float:
    """Bytes of memory for one of so many ranks."""
    return known.memory / world if known.kind == "cpu" else known.memory


def _memory(job: Job, known: Entry) -> Mapping[str, float]:
    try:
        return kept.predict(job, PROCESS) if known.kind == "cpu" else {}
    except ShoalError:
        return {}


def layouts(worlds: Sequence[int], batch: int) -> Iterator[Layout]:
    """Of so many ranks all by replicas, fsdp (with each ZeRO stage), tensor and pipeline; micro-batches that part a
    reader's share of the batch (sequences) in up to eight."""
    for world in worlds:
        for replicas, fsdp, tensor in _triples(world):
            for zero in (3, 2, 1) if fsdp > 1 else (3,):
                pipeline = world // (replicas * fsdp * tensor)
                plain = Layout(replicas=replicas, fsdp=fsdp, tensor=tensor, pipeline=pipeline, zero=zero)
                own, over = divmod(batch, plain.readers)
                yield plain
                for parts in (2, 4, 8) if not over else ():
                    if own % parts == 0:
                        yield replace(plain, micro_batch=own // parts)


def _triples(world: int) -> Iterator[tuple[int, int, int]]:
    """Factors whose product divides it."""
    parts = [n for n in range(1, world + 1) if world % n == 0]
    return ((a, b, c) for a in parts for b in parts for c in parts if world % (a * b * c) == 0)


def _axes(layout: Layout) -> int:
    return sum(getattr(layout, axis) > 1 for axis in ("replicas", "fsdp", "tensor", "pipeline"))


def whole(job: Job) -> Job:
    """With the sizes of its model, where a folder of weights or a tokenizer has them."""
    model = job.model
    if model.weights:
        path = Path(model.weights) / "config.json"
        model = config.from_hf(config.read_json(path), str(path))
    return replace(job, model=replace(model, vocab_size=asked.shape_of(job).vocab))


def question(job: Job, known: Entry, wanted: Wanted) -> tuple[Question, Job]:
    """What a plan of the machine answers, and the job as it is then. JobError for what is absurd, or what no entry of a
    machine can say."""
    train, data = job.train, job.data
    train = replace(train, global_batch=wanted.global_batch or train.global_batch)
    train = replace(train, precision=wanted.precision or train.precision)
    data = replace(data, sequence_length=wanted.sequence or data.sequence_length)
    at_least("--replicas", wanted.replicas, 0)
    agreed, job = job.sync, replace(job, train=train, data=data)
    job.train.validate()
    job.data.validate()
    job = settled(whole(job), known, _most(known))
    found = Question(
        asked.shape_of(job), _cluster(known, job.train.precision), job.data.sequence_length, job.train.global_batch,
        job.train.precision, tokens=asked.tokens_of(wanted.tokens), sync=agreed, server=job.server,
        replicas=wanted.replicas,
    )  # fmt: skip
    return found, job


def _cluster(known: Entry, precision: str) -> Cluster:
    """The machine as one. Its peak: of the largest product that any number of ranks has done, all of them together."""
    sides = [(side.ranks, side.precisions.get(precision)) for side in known.sides if side.ranks <= _most(known)]
    rates = [ranks * _rate(measured) for ranks, measured in sides if measured is not None]
    count = known.cores if known.kind == "cpu" else max(side.ranks for side in known.sides)
    title = f"cores of {known.device}" if known.kind == "cpu" else known.device
    link = Link("pcie", inf, 0.0)
    device = Device(
        known.machine, title, "", {precision: max(rates, default=inf) / count}, {}, True, known.memory / count, inf,
        inf, inf, count, 1, link.kind, link.kind, None, "shoal calibrate",
    )  # fmt: skip
    return Cluster(known.machine, (Pool("machine", device, count, count, link, link),), {})


def _most(known: Entry) -> int:
    """Ranks. On a CPU no more than cores: what so many take from each other is in no table (docs/calibrate.md)."""
    most = max(side.ranks for side in known.sides)
    return min(most, known.cores) if known.kind == "cpu" else most


def _rate(measured: Precision) -> float:
    """FLOP/s of the fastest product."""
    grid = measured.products
    return max(2.0 * prod(shape) / seconds for shape, seconds in zip(grid.shapes, grid.seconds, strict=True))


def plans(asked_for: Question, job: Job, known: Entry, best: int, alike: bool = False) -> Answer:
    """At most `best`, as `answered.plans` of a cluster. JobError where the entry knows none that fits."""
    at_least("best", best, 1)
    begun = time.perf_counter()
    found = ranked(job, known, _most(known), asked_for.replicas)
    every = [_plan(asked_for, one, known) for one in found if refused(job, one.layout) is None]
    require(bool(every), "the job refuses the layouts that fit", "shoal train --dry-run says why")
    kept_ = every if alike else unlike(every)
    return Answer(
        tuple(kept_[:best]), time.perf_counter() - begun, len(found), len(found), None, len(kept_) > best
    )  # fmt: skip


def _plan(question: Question, one: Ranked, known: Entry) -> Plan:
    seconds, tokens = one.step.seconds, question.global_batch * question.sequence
    rate, world = tokens / seconds, one.layout.world
    most = max(one.step.parts, key=lambda part: one.step.parts[part])
    peak = question.cluster.count * question.cluster.pools[0].device.peak[question.precision]
    return Plan(
        one.layout, 1, seconds, _LOW * seconds, _HIGH * seconds, rate, rate / world,
        question.shape.flops_per_token(question.sequence) * rate / peak, one.memory, _each(known, world),
        one.step.parts, one.step.parts["bubble"] / seconds, one.step.parts["exchange"] / seconds,
        f"{CALLED[most]} ({100 * one.step.parts[most] / seconds:.0f} % of a step)", None,
        None if question.tokens is None else question.tokens / rate / 86400,
    )  # fmt: skip


def text(question: Question, answer: Answer, known: Entry, explain: int) -> str:
    """The whole answer; of the first `explain` plans where time and memory go."""
    width = shutil.get_terminal_size((200, 24)).columns
    parts = [show.title(question), show.table(question, answer, width), _remarks(question, answer, known)]
    parts += [show.explained(plan, number) for number, plan in enumerate(answer.plans[:explain], 1)]
    return "\n\n".join(parts)


def _remarks(question: Question, answer: Answer, known: Entry) -> str:
    best = answer.plans[0]
    found = [f"{why(best, other)}." for other in answer.plans[1:2]]
    found.append(f"What takes most: {best.limit}.")
    ranks = ", ".join(str(side.ranks) for side in known.sides if side.ranks <= _most(known))
    found.append(
        f"Predicted by what `shoal calibrate` measured on {known.date[:10]} with {ranks} ranks. Steps nearly always "
        "take longer than that: the 80 % are what was seen. MFU is of the fastest product measured, memory of one rank."
    )
    found.append(
        f"The fastest of {counted(answer.candidates, 'layout')} that these measurements know and memory holds; "
        f"found in {short(answer.seconds)}. What they do not know: docs/calibrate.md."
    )
    return "\n".join(found)
