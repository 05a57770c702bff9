"""What a step keeps in a device's memory: the fullest stage of the pipeline, part by part. All closed forms."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from shoal.errors import JobError
from shoal.job.layout import SCHEDULES
from shoal.planning import block, constants, experts
from shoal.planning.schedules import V_SHAPED
from shoal.planning.work import Array, Work

# Bytes of a weight in 16 bits. AdamW's for it are in `work.moments`.
_WEIGHT = 2.0
# Of a logit: in 16 bits, in fp32 for the loss, and its gradient.
_LOGIT = 10.0
# Of a loss by tiles (`ops.loss`): logits of one, their softmax in fp32 and its gradient.
_TILE = 3 * 16 * 2.0**20
KINDS = ("allocated", "reserved", "device")
"""By the allocator in tensors; by it from the device; all that the device has in use (nvidia-smi)."""


class Memory(NamedTuple):
    """Bytes on a device of the fullest stage, (n,) each. activations: of blocks, those of all micro-batches in flight.
    logits: of the output layer and the loss. buffers: gathered weights and gradients of FSDP, messages of a pipeline,
    gathered sequences of a tensor group. sync: of what replicas exchange: common weights, what a codec lost, what is on
    its way."""

    weights: Array
    gradients: Array
    optimizer: Array
    activations: Array
    logits: Array
    buffers: Array
    sync: Array

    @property
    def allocated(self) -> Array:
        return np.asarray(sum(self), dtype=np.float64)

    def total(self, kind: str = "reserved", capacity: float | Array = math.inf) -> Array:
        """kind: one of KINDS. Fragments are a share of what is allocated; beside the allocator is what has the same
        size on every device: its context, libraries, communicators. capacity: bytes of the device, of which that is a
        tenth at most: it was fitted on devices of 80 GiB, and smaller ones are not used so."""
        if kind not in KINDS:
            raise JobError(f"no memory is called {kind!r}", fix=f"one of {', '.join(KINDS)}")
        known = constants.memory()
        factor = 1.0 if kind == "allocated" else known["fragments"].value
        beside = np.minimum(known["beside"].value * 2**30, 0.1 * np.asarray(capacity))
        return self.allocated * factor + (beside if kind == "device" else 0.0)


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
    routed = owned_experts(work, rank, schedule)
    live = in_flight(schedule, rank, work.pipeline, work.chunks, work.micro_batches)

    def held(least: int) -> Array:
        """Weights of a rank, where ZeRO shares them from stage `least` on."""
        shared = work.stage_zero >= least
        return own / np.where(shared, work.sharers, 1.0) + routed / np.where(shared, work.expert_sharers, 1.0)

    return Memory(
        weights=held(3) * _WEIGHT,
        gradients=held(2) * work.kept_bytes,
        optimizer=held(1) * work.moments,
        activations=_activations(work, layers, dense_layers(work, rank, schedule), live),
        logits=np.where(ends[1], _logits(work), 0.0),
        buffers=_buffers(work, ends),
        sync=held(1) * work.synced,
    )


def _logits(work: Work) -> Array:
    """All at once; or by tiles, and then what the loss keeps for backward: gradients of its input and its weights."""
    whole, rows = block.tokens(work), work.vocab / work.tensor
    tiled = _TILE + 4 * work.hidden * (whole + rows)
    return np.where(work.tiles > 0, tiled, whole * work.vocab / work.tensor * _LOGIT)


def owned(work: Work, rank: Array, schedule: str = "1f1b") -> Array:
    """Weights of a rank's stages, but for routed experts, on one rank of the tensor group, before ZeRO or FSDP shard
    them (routers, and latent attention's first products, as if cut too: each rank has all of these few). Output layers
    that are tied share the embedding's weights where a stage has both."""
    begins, ends = _ends(work, rank, schedule)
    both = begins & ends & (work.tied > 0)
    tables = begins.astype(np.float64) + ends - both
    dense = dense_layers(work, rank, schedule)
    blocks = dense * work.block_parameters + (_layers(work, rank, schedule) - dense) * work.beside_experts
    return np.asarray((blocks + tables * work.vocab * work.hidden) / work.tensor, dtype=np.float64)


def owned_experts(work: Work, rank: Array, schedule: str = "1f1b") -> Array:
    """Weights of the routed experts that a rank computes, before ZeRO or FSDP share them over those with the same."""
    routed = _layers(work, rank, schedule) - dense_layers(work, rank, schedule)
    return np.asarray(routed * work.experts / work.expert * work.expert_parameters, dtype=np.float64)


def in_flight(schedule: str, rank: Array, ranks: Array, chunks: Array, batches: Array) -> Array:
    """Most micro-batches of whose activations a rank keeps all at once; one of a chunk counts as its share of a rank.

    As the orders in `schedules` say (tests count them). GPipe and looped breadth-first keep all; 1F1B and interleaved
    1F1B: Narayanan et al. 2021, section 2.2. Zero-bubble interleaved and ZBV keep on every rank what 1F1B keeps on its
    first; DualPipeV half a micro-batch more.
    """
    if schedule in ("gpipe", "looped_bfs"):
        return np.asarray(batches + 0 * ranks, dtype=np.float64)
    if schedule in ("zbv", "dualpipev", "interleaved_zero_bubble"):
        return np.minimum(batches, ranks + (0.5 if schedule == "dualpipev" else 0.0))
    # Forward passes before the first backward one, and the one between.
    ahead = np.where(chunks > 1, 2 * (ranks - rank - 1) + (chunks - 1) * ranks, ranks - rank - 1)
    return np.minimum(batches, (ahead + 1) / chunks)


def of_block(work: Work, *, routed: bool = False) -> tuple[Array, Array, Array]:
    """Bytes that a block keeps of one micro-batch on a rank: (its input, all but attention's scores, the scores).

    Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", table 2, by operators: of
    each token 2 bytes of what enters products, 1 of a dropout's mask. FlashAttention keeps 4 a head and token.
    routed: of a block with experts: what enters theirs, their inner values, and what they give, for each token that
    chose them.
    """
    t, h = work.tensor, work.hidden
    tokens = block.tokens(work)
    sharing = np.where(work.shards > 0, t, 1.0)
    # Inputs of two norms and of the products behind them, and two masks.
    whole = 10 * h / sharing
    attention = (2 * (work.heads + 2 * work.key_heads) + 2 * work.heads) * work.head_size
    # Latent: queries, keys, values of all heads, what attention gives; and what they are made from, on each rank.
    spread = work.heads * (4 * work.head_size + 4 * work.value_size)
    attention = np.where(work.latent > 0, spread, attention)
    whole = whole + np.where(work.latent > 0, 2 * (work.latent_q + work.latent_kv + work.rope_size), 0.0)
    inner = 4 + 2 * work.gated
    cut = (attention + (work.shared_feed if routed else work.feed) * inner) / t
    chosen = experts.rows(work) * (4 * h + work.expert_feed * inner) if routed else 0.0
    scores = np.where(work.flash == 0, 5 * work.heads * work.sequence, 4 * work.heads) / t
    return tokens * 2 * h / sharing, tokens * (whole + cut) + chosen, tokens * scores


def _activations(work: Work, layers: Array, dense: Array, live: Array) -> Array:
    """Where blocks are computed again their inputs are kept, and the largest one's all while it is."""
    given, rest, scores = of_block(work)
    routed = of_block(work, routed=True)[1]
    kept, kept_routed = layers * live, (layers - dense) * live
    there = np.minimum(kept, 1.0)
    most = np.where(kept_routed > 0, np.where(dense > 0, np.maximum(rest, routed), routed), rest)
    again = np.maximum(kept - 1, 0) * given + there * (most + scores)
    more = kept_routed * (routed - rest)
    part = kept * rest + more + there * scores
    whole = kept * (rest + scores) + more
    operators = np.maximum(kept - 1, 0) * (given + _every_second(work)) + there * (most + scores)
    held = np.where(work.operators > 0, operators, np.where(work.selective > 0, part, whole))
    return work.recompute * again + (1 - work.recompute) * held


def _every_second(work: Work) -> Array:
    """Bytes of what is kept of a block beside its input where all is computed again but attention and every second
    product: queries, values, the gate's or the first of the feed-forward, its output (torch.utils.checkpoint's policy
    as torchtitan has it, 2024), and what attention gives, with 4 of each head."""
    t, tokens = work.tensor, block.tokens(work)
    sharing = np.where(work.shards > 0, t, 1.0)
    cut = 2 * (2 * work.heads + work.key_heads) * work.head_size + 2 * work.feed + 4 * work.heads
    return tokens * (cut / t + 2 * work.hidden / sharing)


def dense_layers(work: Work, rank: Array, schedule: str = "1f1b") -> Array:
    """Of a rank's blocks those without experts: they come first in the model."""
    return np.where(work.experts > 0, _before(work, rank, schedule, work.dense_layers), _layers(work, rank, schedule))


def _layers(work: Work, rank: Array, schedule: str) -> Array:
    """Of a rank: as many on all as fit, what remains on the last, where the output layer is."""
    return _before(work, rank, schedule, work.layers)


def _before(work: Work, rank: Array, schedule: str, count: Array) -> Array:
    """Of the model's first `count` blocks those that a rank holds."""
    chunks = np.full(len(work), 2.0) if schedule in V_SHAPED else work.chunks
    each = np.ceil(work.layers / work.pipeline) / chunks
    found = np.zeros(len(work))
    for chunk in range(int(chunks.max(initial=0))):
        place = chunk * work.pipeline + rank
        if schedule in V_SHAPED and chunk:
            place = 2 * work.pipeline - 1 - rank
        found += np.where(chunk < chunks, np.clip(count - each * place, 0, each), 0.0)
    return found


def _ends(work: Work, rank: Array, schedule: str) -> tuple[np.ndarray, np.ndarray]:
    """Which ranks have the embedding, and which the output layer."""
    begins = rank == 0
    return begins, begins if schedule in V_SHAPED else rank == work.pipeline - 1


def _buffers(work: Work, ends: tuple[np.ndarray, np.ndarray]) -> Array:
    """FSDP (Zhao et al. 2023): weights of the running block, and of the next one; gradients of one before they are
    scattered; the table of a stage that has one. A pipeline's message in and out of each chunk; a gathered sequence."""
    one = work.block_parameters / work.tensor
    table = np.where(ends[0] | ends[1], work.vocab * work.hidden / work.tensor, 0.0)
    own = work.experts / work.expert * work.expert_parameters
    one = np.where(
        work.experts > 0, np.maximum(one * (work.dense_layers > 0), work.beside_experts / work.tensor + own), one
    )
    gathered = 2 * one * _WEIGHT + one * (_WEIGHT + work.gradient_bytes) + table * _WEIGHT
    fsdp = np.where((work.stage_zero == 3) & (work.sharers > 1), gathered, 0.0)
    # What an exchange of experts sends and receives.
    sent = np.where((work.experts > 0) & (work.expert > 1), 2 * experts.rows(work) * work.hidden * 2, 0.0)
    size = block.tokens(work) * work.hidden * 2
    sharing = (work.shards > 0) & (work.tensor > 1)
    messages = np.where(work.pipeline > 1, 2 * work.chunks * size / np.where(sharing, work.tensor, 1.0), 0.0)
    return np.asarray(fsdp + sent + messages + np.where(sharing, size, 0.0), dtype=np.float64)
