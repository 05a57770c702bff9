"""All layouts that a question leaves open, as columns of numbers: those that a job may have (`job.fits`), and no other.

In two parts. A *base* says how a replica is cut: tensor, context, pipeline with its schedule, experts, micro-batch,
recomputation. What is left of the devices reads different data, and a base's *splits* say who of these share the
model: fsdp × replicas, and ZeRO's stage.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from shoal.job.fits import SPLIT_BACKWARD
from shoal.job.layout import SCHEDULES, Layout
from shoal.planning.plan import Question
from shoal.planning.schedules import LOOPS

Numbers = npt.NDArray[np.int64]

NAMES = tuple(SCHEDULES)
"""Of schedules, by their numbers in `Bases.schedule`."""
MICRO, CHUNKS, POSITIONS = 16, 8, 1024
"""Sequences of a micro-batch and stages of a rank, at most; positions of a context rank, at least."""


@dataclass(frozen=True)
class Bases:
    """Whole numbers, (n,) each. data: readers, replicas × fsdp. schedule: a number in NAMES, that of 1f1b where there
    is no pipeline. chunks: stages of a rank. recompute: 1 where blocks are computed again."""

    tensor: Numbers
    context: Numbers
    pipeline: Numbers
    schedule: Numbers
    chunks: Numbers
    micro_batch: Numbers
    recompute: Numbers
    expert: Numbers
    data: Numbers

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, which: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Bases:
        return Bases(*(getattr(self, f.name)[which] for f in fields(self)))

    def layout(self, number: int, fsdp: int, zero: int, layers: int) -> Layout:
        """Of one base, split so. Stages are given where a rank has another number of them than is usual."""
        pipeline, chunks = int(self.pipeline[number]), int(self.chunks[number])
        schedule = NAMES[self.schedule[number]]
        given = pipeline > 1 and chunks != SCHEDULES[schedule]
        return Layout(
            replicas=int(self.data[number]) // fsdp, pipeline=pipeline, fsdp=fsdp, context=int(self.context[number]),
            tensor=int(self.tensor[number]), expert=int(self.expert[number]), zero=zero,
            micro_batch=int(self.micro_batch[number]), schedule=schedule,
            stages=_stages(layers, pipeline * chunks) if given else "",
            recompute="block" if self.recompute[number] else "none",
        )  # fmt: skip


def bases(question: Question) -> Bases:
    """Of a cluster of one pool."""
    shape, count, batch = question.shape, question.cluster.count, question.global_batch
    options = [(name, chunks) for name in NAMES for chunks in _chunks(name)]
    axes = (
        [t for t in divisors(count) if _tensor(question, t)],
        [c for c in divisors(count) if _context(question, c)],
        [p for p in divisors(count) if p <= shape.layers],
        range(len(options)),
        [b for b in divisors(batch) if b <= MICRO],
        (0, 1),
        divisors(shape.experts) if shape.experts else [1],
    )
    t, c, p, option, b, recompute, expert = (
        grid.ravel() for grid in np.meshgrid(*(np.array(axis, dtype=np.int64) for axis in axes), indexing="ij")
    )
    schedule, chunks = (
        np.array([NAMES.index(n) for n, _ in options])[option],
        np.array([k for _, k in options])[option],
    )
    ranks = t * c * p
    data = count // ranks
    kept = (count % ranks == 0) & (data > 0)
    data = np.maximum(data, 1)
    kept &= batch % (data * b) == 0
    kept &= (data * c * t) % expert == 0
    kept &= np.where(p == 1, option == options.index(("1f1b", 1)), p * chunks <= shape.layers)
    kept &= _positions(question, t, c)
    kept &= (p == 1) | (recompute == 0) | ~np.isin(schedule, [NAMES.index(name) for name in SPLIT_BACKWARD])
    kept &= (p == 1) | _enough(schedule, p, batch // (data * b))
    kept &= _agreeing(question, t, c, p, expert, data)
    return Bases(t, c, p, schedule, chunks, b, recompute, expert, data).take(kept)


def splits(base: Bases, number: int, question: Question) -> list[tuple[int, int]]:
    """(fsdp, ZeRO's stage) of one base. Where nothing is shared, the stage says nothing, and is the usual one."""
    t, c, expert, data = (int(getattr(base, name)[number]) for name in ("tensor", "context", "expert", "data"))
    degrees = [data // question.replicas] if question.replicas else divisors(data)
    if question.shape.experts and _alone(question):
        degrees = [1]
    return [
        (fsdp, zero) for fsdp in degrees if fsdp * c * t % expert == 0 for zero in ((1, 2, 3) if fsdp * c > 1 else (3,))
    ]


def divisors(number: int) -> list[int]:
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def _chunks(schedule: str) -> range | tuple[int]:
    usual = SCHEDULES[schedule]
    return range(usual, CHUNKS + 1) if schedule in LOOPS else (usual,)


def _tensor(question: Question, ranks: int) -> bool:
    """As `fits.check_tensor` says."""
    shape = question.shape
    heads, keys = shape.heads, shape.key_heads
    shared = heads % ranks == 0 and (keys % ranks == 0 or ranks % keys == 0)
    widths = (shape.vocab, shape.feed, shape.shared_feed)
    return shared and all(width == 0 or width >= ranks for width in widths)


def _context(question: Question, ranks: int) -> bool:
    shape = question.shape
    return ranks == 1 or (question.sequence >= POSITIONS * ranks and shape.value_size <= shape.head_size)


def _positions(question: Question, tensor: Numbers, context: Numbers) -> npt.NDArray[np.bool_]:
    """Each rank gets as many: as `fits` says of the ring."""
    unit = np.where(context > 1, np.lcm(2 * context, tensor * context), tensor * context)
    return np.asarray(question.sequence % unit == 0)


def _enough(schedule: Numbers, ranks: Numbers, batches: Numbers) -> npt.NDArray[np.bool_]:
    """Micro-batches, as `fits.enough` says."""
    rounds = np.maximum(1, batches // ranks)
    least = np.ones_like(ranks)
    turns = np.isin(schedule, [NAMES.index(name) for name in ("interleaved", "interleaved_zero_bubble")])
    least = np.where(turns | (schedule == NAMES.index("1f1b")), ranks, least)
    least = np.where(schedule == NAMES.index("dualpipev"), 2 * ranks, least)
    return np.asarray((batches >= least) & (~turns | (batches % rounds == 0)))


def _alone(question: Question) -> bool:
    """No two ranks of a replica may have the same weights: as `fits.EXCLUDED` says of local steps with a codec."""
    return question.sync.name == "local" and question.sync.codec not in ("none", "bf16", "auto")


def _agreeing(
    question: Question, tensor: Numbers, context: Numbers, pipeline: Numbers, expert: Numbers, data: Numbers
) -> npt.NDArray[np.bool_]:
    """There is a split with as many replicas as are asked for, and with nothing that the sync excludes."""
    replicas = np.full_like(data, question.replicas) if question.replicas else np.ones_like(data)
    fsdp = data // replicas
    kept = data % replicas == 0
    if _alone(question):
        kept &= (tensor == 1) & (pipeline == 1)
        if question.shape.experts:
            kept &= (context == 1) & ((fsdp == 1) | (question.replicas == 0))
            fsdp = np.ones_like(data)
    return np.asarray(kept & (fsdp * context * tensor % expert == 0))


def _stages(layers: int, count: int) -> str:
    """Blocks of each stage: as many as of any other, or one more, in the first ones."""
    each, more = divmod(layers, count)
    return "+".join(str(each + (n < more)) for n in range(count))
