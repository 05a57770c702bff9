"""How long a step takes: blocks, pipeline, output layer, gradients over replicas, optimizer. All closed forms."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shoal.planning import block, closed, collectives, products
from shoal.planning.block import Cost
from shoal.planning.constants import CALL, HOP, Constants, Rates
from shoal.planning.work import Array, Work

# Bytes that an optimizer reads and writes for a weight: fp32 master, two moments, gradient; and the 16-bit weight.
_OPTIMIZER, _WEIGHT = 28.0, 2.0
# Kernels of an optimizer's step.
_LAUNCHES = 100.0


class Step(NamedTuple):
    """seconds: of a step, (n,). parts: what of it goes where; they add up to it."""

    seconds: Array
    parts: dict[str, Array]


class _Stages(NamedTuple):
    """slowest, all: seconds of a micro-batch on the slowest rank, and on all of the pipeline one after another."""

    slowest: Array
    all: Array


def cost(work: Work, constants: Constants) -> Step:
    rates = Rates.of(constants, work)
    of_block = block.cost(work, constants, rates)
    fsdp_forward, fsdp_backward, fsdp_head = _fsdp(work, constants, rates, of_block)
    head = _head(work, constants, rates) + fsdp_head
    layer = of_block.forward + of_block.backward + fsdp_forward + fsdp_backward
    stages = _stages(work, layer, head)
    batches = work.micro_batches
    steady = batches * stages.slowest
    bubble = np.where(work.pipeline > 1, closed.bubble(work.chunks, stages.slowest, stages.all), 0.0)
    messages = _messages(work, rates)
    data = _data(work, constants, rates, of_block)
    optimizer = _optimizer(work, rates)
    share = np.where(layer > 0, steady / np.maximum(stages.slowest, 1e-30), 0.0)
    most = _layers(work)
    parts = {
        "tensor": share * most * of_block.tensor,
        "context": share * most * of_block.context,
        "fsdp": share * (most * (fsdp_forward + fsdp_backward)),
        "bubble": bubble,
        "messages": messages,
        "data": data,
        "optimizer": optimizer,
    }
    seconds = steady + bubble + messages + data + optimizer
    parts["compute"] = seconds - sum(parts.values())
    return Step(seconds, parts)


def _layers(work: Work) -> Array:
    """Of the fullest stage."""
    return np.ceil(work.layers / work.pipeline / work.chunks) * work.chunks


def _stages(work: Work, layer: Array, head: Array) -> _Stages:
    most, alone = _layers(work), work.pipeline == 1
    full = most * layer
    last = np.maximum(work.layers - most * (work.pipeline - 1), 0) * layer + head
    last = np.where(alone, work.layers * layer + head, last)
    slowest = np.where(alone, last, np.maximum(full, last))
    return _Stages(slowest, np.where(alone, last, (work.pipeline - 1) * full + last))


def _head(work: Work, constants: Constants, rates: Rates) -> Array:
    """Output layer and loss, forward and backward, and the embedding, of a micro-batch."""
    odd, align = constants.shared("odd"), constants.shared("align")
    m_T, n, k = block.tokens(work), work.vocab / work.tensor, work.hidden
    zero = np.zeros(len(work))
    three = (
        products.seconds(work, rates, odd, align, m_T, n, k, zero)
        + products.seconds(work, rates, odd, align, m_T, k, n, zero)
        + products.seconds(work, rates, odd, align, n, k, m_T, zero)
    )
    # Logits, their softmax in fp32, its gradient: 20 bytes each. The embedding: 16 bytes a value.
    element = constants.shared("elem") / rates.memory
    return three + element * m_T * (20 * n + 16 * k) + np.where(work.tensor > 1, 3 * CALL, 0.0)


def _fsdp(work: Work, constants: Constants, rates: Rates, of_block: Cost) -> tuple[Array, Array, Array]:
    """What shows of gathering a block's weights, twice, and scattering its gradients (Rajbhandari et al. 2020; Zhao et
    al. 2023), of a micro-batch: forward, backward, and of the output layer."""
    used = work.zero == 3
    ranks = np.where(used, work.fsdp, 1.0)
    inside = ranks * work.tensor <= work.per_node
    members = np.maximum(1.0, np.minimum(ranks, work.per_node / work.tensor))
    ring = collectives.bus(rates, inside, members)
    hops = np.where(inside, 0.0, HOP * ranks * work.tensor / work.per_node)
    expose = constants.shared("expose")

    def exchanged(size: Array) -> Array:
        return collectives.scatter(size, ranks, ring, hops)

    own = work.block_parameters / work.tensor
    gather, scatter = exchanged(own * 2), exchanged(own * work.gradient_bytes)
    table = work.vocab / work.tensor * work.hidden
    head = expose * (2 * exchanged(table * 2) + exchanged(table * work.gradient_bytes))
    forward = collectives.shown(gather, of_block.forward, expose)
    backward = collectives.shown(gather + scatter, of_block.backward, expose)
    return np.where(used, forward, 0.0), np.where(used, backward, 0.0), np.where(used, head, 0.0)


def _messages(work: Work, rates: Rates) -> Array:
    """Of a pipeline, on its critical path; of interleaved schedules that wait for what they send, all."""
    p, v, batches = work.pipeline, work.chunks, work.micro_batches
    size = block.tokens(work) * work.hidden * 2
    split = np.where((work.shards > 0) | (work.tensor > 1), work.tensor, 1.0)
    gathered = np.where((work.tensor > 1) & (work.shards == 0), size / rates.link, 0.0)
    one = size / split / rates.nic + HOP + gathered
    counted = np.where((v > 1) & (work.overlaps_messages == 0), 2 * v * batches, closed.messages(p, v, batches))
    return np.where(p > 1, counted * one, 0.0)


def _owned(work: Work) -> Array:
    """Weights of the fullest rank, before any sharding."""
    blocks = np.ceil(work.layers / work.pipeline) * work.block_parameters
    return (blocks + work.vocab * work.hidden) / work.tensor


def _data(work: Work, constants: Constants, rates: Rates, of_block: Cost) -> Array:
    """Reducing gradients over replicas once a step, gathering weights where the optimizer is sharded: what shows."""
    full, first = work.zero == 3, work.zero == 1
    replicas = np.where(full, work.data / work.fsdp, work.data)
    inside = work.tensor * work.context * work.data <= work.per_node
    same = np.maximum(1.0, np.floor(work.per_node / (work.tensor * work.context)))
    ring = collectives.bus(rates, inside, np.minimum(same, work.data))
    hops = np.where(inside, CALL, 2 * HOP * np.log2(np.maximum(work.data, 2)))
    own = np.where(full, _owned(work) / work.fsdp, _owned(work))
    reduced = collectives.scatter(own * work.gradient_bytes, replicas, ring, hops)
    reduced = reduced * np.where(work.reduces_whole > 0, 2.0, 1.0)
    back = np.where(first, 2.0, work.gradient_bytes)
    gathered = collectives.scatter(own * back, replicas, ring, hops)
    expose, most = constants.shared("expose") / 2, _layers(work)
    under = collectives.shown(reduced, most * of_block.backward, expose)
    under = under + collectives.shown(gathered, most * of_block.forward, expose)
    return np.where(replicas > 1, np.where(work.overlaps_data > 0, under, reduced + gathered), 0.0)


def _optimizer(work: Work, rates: Rates) -> Array:
    full = work.zero == 3
    sharers = np.where(full, work.fsdp, np.where(work.zero >= 1, work.data, 1.0))
    weights = _owned(work) / np.where(full, work.fsdp, 1.0)
    bytes_moved = _owned(work) / sharers * _OPTIMIZER + weights * _WEIGHT
    return bytes_moved / rates.memory + _LAUNCHES * rates.host
