"""What a step keeps in a device's memory: the fullest stage of the pipeline, part by part. All closed forms."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shoal.errors import JobError
from shoal.planning import block, constants
from shoal.planning.work import Array, Work

# Bytes of a weight in 16 bits; of AdamW's for it: fp32 master and two moments (Rajbhandari et al. 2020, "ZeRO").
_WEIGHT, _OPTIMIZER = 2.0, 12.0
# Of a logit: in 16 bits, in fp32 for the loss, and its gradient.
_LOGIT = 10.0
SCHEDULES = ("1f1b", "gpipe", "zero-bubble", "v")
"""1f1b: interleaved where a rank has several chunks. zero-bubble: ZB-H1. v: two chunks a rank, there and back."""
KINDS = ("allocated", "reserved", "device")
"""By the allocator in tensors; by it from the device; all that the device has in use (nvidia-smi)."""


class Memory(NamedTuple):
    """Bytes on a device of the fullest stage, (n,) each. activations: of blocks, those of all micro-batches in flight.
    logits: of the output layer and the loss. buffers: gathered weights and gradients of FSDP, messages of a pipeline,
    gathered sequences of a tensor group."""

    weights: Array
    gradients: Array
    optimizer: Array
    activations: Array
    logits: Array
    buffers: Array

    @property
    def allocated(self) -> Array:
        return np.asarray(sum(self), dtype=np.float64)

    def total(self, kind: str = "reserved") -> Array:
        """kind: one of KINDS. Fragments are a share of what is allocated; beside the allocator is what has the same
        size on every device: its context, libraries, communicators."""
        if kind not in KINDS:
            raise JobError(f"no memory is called {kind!r}", fix=f"one of {', '.join(KINDS)}")
        known = constants.memory()
        factor = 1.0 if kind == "allocated" else known["fragments"].value
        return self.allocated * factor + (known["beside"].value * 2**30 if kind == "device" else 0.0)


def cost(work: Work, schedule: str = "1f1b") -> Memory:
    """Of the fullest stage. In every schedule no stage between the ends is fuller than the first: it has as many
    layers and micro-batches, or fewer, and neither embedding nor output layer."""
    first, last = stage(work, np.zeros(len(work)), schedule), stage(work, work.pipeline - 1, schedule)
    fuller = last.allocated > first.allocated
    return Memory(*(np.where(fuller, end, begin) for begin, end in zip(first, last, strict=True)))


def stage(work: Work, rank: Array, schedule: str = "1f1b") -> Memory:
    """Of one rank of each candidate's pipeline. rank: (n,), from 0."""
    if schedule not in SCHEDULES:
        raise JobError(f"no schedule is called {schedule!r}", fix=f"one of {', '.join(SCHEDULES)}")
    layers = _layers(work, rank, schedule)
    ends = _ends(work, rank, schedule)
    own = owned(work, rank, schedule)
    shared = np.where(work.zero >= 1, work.fsdp, 1.0)
    live = in_flight(schedule, rank, work.pipeline, work.chunks, work.micro_batches)
    return Memory(
        weights=own * _WEIGHT / np.where(work.zero >= 3, shared, 1.0),
        gradients=own * work.kept_bytes / np.where(work.zero >= 2, shared, 1.0),
        optimizer=own * _OPTIMIZER / shared,
        activations=_activations(work, layers, live),
        logits=np.where(ends[1], block.tokens(work) * work.vocab / work.tensor * _LOGIT, 0.0),
        buffers=_buffers(work, ends),
    )


def owned(work: Work, rank: Array, schedule: str = "1f1b") -> Array:
    """Weights of a rank's stages on one rank of the tensor group, before ZeRO or FSDP shard them. Output layers that
    are tied share the embedding's weights where a stage has both."""
    begins, ends = _ends(work, rank, schedule)
    both = begins & ends & (work.tied > 0)
    tables = begins.astype(np.float64) + ends - both
    blocks = _layers(work, rank, schedule) * work.block_parameters
    return np.asarray((blocks + tables * work.vocab * work.hidden) / work.tensor, dtype=np.float64)


def in_flight(schedule: str, rank: Array, ranks: Array, chunks: Array, batches: Array) -> Array:
    """Most micro-batches of whose activations a rank keeps all at once; one of a chunk counts as its share of a rank.

    1F1B and interleaved: Narayanan et al. 2021, section 2.2. GPipe (Huang et al. 2019) keeps all. ZB-H1 (Qi et al.
    2023, "Zero Bubble Pipeline Parallelism"), and V schedules of its kind (Qi et al. 2024, "Pipeline Parallelism with
    Controllable Memory"), keep as much on all ranks as 1F1B on its first.
    """
    if schedule == "gpipe":
        return np.asarray(batches + 0 * ranks, dtype=np.float64)
    if schedule in ("zero-bubble", "v"):
        return np.minimum(batches, ranks)
    # Forward passes before the first backward one, and the one between.
    ahead = np.where(chunks > 1, 2 * (ranks - rank - 1) + (chunks - 1) * ranks, ranks - rank - 1)
    return np.minimum(batches, (ahead + 1) / chunks)


def of_block(work: Work) -> tuple[Array, Array, Array]:
    """Bytes that a block keeps of one micro-batch on a rank: (its input, all but attention's scores, the scores).

    Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", table 2, by operators: of
    each token 2 bytes of what enters products, 1 of a dropout's mask. FlashAttention keeps 4 a head and token.
    """
    t, h = work.tensor, work.hidden
    tokens = block.tokens(work)
    sharing = np.where(work.shards > 0, t, 1.0)
    # Inputs of two norms and of the products behind them, and two masks.
    whole = 10 * h / sharing
    attention = (2 * (work.heads + 2 * work.key_heads) + 2 * work.heads) * work.head_size
    cut = (attention + work.feed * (4 + 2 * work.gated)) / t
    scores = np.where(work.flash == 0, 5 * work.heads * work.sequence, 4 * work.heads) / t
    return tokens * 2 * h / sharing, tokens * (whole + cut), tokens * scores


def _activations(work: Work, layers: Array, live: Array) -> Array:
    """Where blocks are computed again their inputs are kept, and one block's all while it is."""
    given, rest, scores = of_block(work)
    kept = layers * live
    there = (kept > 0).astype(np.float64)
    again = np.maximum(kept - 1, 0) * given + there * (rest + scores)
    part = kept * rest + there * scores
    return np.where(work.recompute > 0, again, np.where(work.selective > 0, part, kept * (rest + scores)))


def _layers(work: Work, rank: Array, schedule: str) -> Array:
    """Of a rank: as many on all stages as fit, what remains on the last."""
    chunks = np.full(len(work), 2.0) if schedule == "v" else work.chunks
    each = np.ceil(work.layers / work.pipeline / chunks)
    found = np.zeros(len(work))
    for chunk in range(int(chunks.max(initial=0))):
        place = chunk * work.pipeline + rank
        if schedule == "v" and chunk:
            place = 2 * work.pipeline - 1 - rank
        found += np.where(chunk < chunks, np.clip(work.layers - each * place, 0, each), 0.0)
    return found


def _ends(work: Work, rank: Array, schedule: str) -> tuple[np.ndarray, np.ndarray]:
    """Which ranks have the embedding, and which the output layer."""
    begins = rank == 0
    return begins, begins if schedule == "v" else rank == work.pipeline - 1


def _buffers(work: Work, ends: tuple[np.ndarray, np.ndarray]) -> Array:
    """FSDP (Zhao et al. 2023): weights of the running block, and of the next one; gradients of one before they are
    scattered; the table of a stage that has one. A pipeline's message in and out of each chunk; a gathered sequence."""
    one = work.block_parameters / work.tensor
    table = np.where(ends[0] | ends[1], work.vocab * work.hidden / work.tensor, 0.0)
    gathered = 2 * one * _WEIGHT + one * (_WEIGHT + work.gradient_bytes) + table * _WEIGHT
    fsdp = np.where((work.zero == 3) & (work.fsdp > 1), gathered, 0.0)
    size = block.tokens(work) * work.hidden * 2
    sharing = (work.shards > 0) & (work.tensor > 1)
    messages = np.where(work.pipeline > 1, 2 * work.chunks * size / np.where(sharing, work.tensor, 1.0), 0.0)
    return np.asarray(fsdp + messages + np.where(sharing, size, 0.0), dtype=np.float64)
