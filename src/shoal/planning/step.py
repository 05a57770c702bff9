"""How long a step takes: blocks, pipeline, output layer, gradients over replicas, optimizer. All closed forms."""

from __future__ import annotations

from dataclasses import astuple
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shoal.planning import block, closed, collectives, products
from shoal.planning.block import Cost
from shoal.planning.constants import CALL, HOP, Constants, Rates
from shoal.planning.work import Array, Work

# Bytes that an optimizer reads and writes for a weight: fp32 master, two moments, gradient; and the 16-bit weight.
_OPTIMIZER, _WEIGHT = 28.0, 2.0
# Schedules that compute gradients of weights apart, later.
_SPLIT = ("interleaved_zero_bubble", "zbv", "dualpipev")
# Kernels of an optimizer's step.
_LAUNCHES = 100.0


class Step(NamedTuple):
    """seconds: of a step, (n,). parts: what of it goes where; they add up to it."""

    seconds: Array
    parts: dict[str, Array]


class _Fsdp(NamedTuple):
    """What shows of gathering and scattering: seconds of a block's passes, and of the output layer's."""

    forward: Array
    backward: Array
    head: Array


class _Stages(NamedTuple):
    """slowest, all: seconds of a micro-batch on the slowest rank, and on all of the pipeline one after another."""

    slowest: Array
    all: Array


class Passes(NamedTuple):
    """Seconds of a micro-batch with what FSDP shows, (n,) each: of a block (with experts, where there are any), of one
    of the leading ones without, and of output layer, loss and embedding."""

    forward: Array
    backward: Array
    leading_forward: Array
    leading_backward: Array
    head: Array


class Blocks(NamedTuple):
    """What a block takes, which no choice of pipeline, ZeRO or replicas changes, (n,) each. rates: of the devices.
    dense: of a block without experts. routed: of one with them, None where no candidate has any. head: seconds of
    output layer, loss and embedding for a micro-batch."""

    rates: Rates
    dense: Cost
    routed: Cost | None
    head: Array

    def take(self, which: npt.NDArray[np.intp]) -> Blocks:
        """Of candidates that have the blocks of these. All must have the same devices and software."""
        dense, routed = (
            None if part is None else Cost(*(a[which] for a in part)) for part in (self.dense, self.routed)
        )
        assert dense is not None
        return Blocks(Rates(*(rate[:1] for rate in astuple(self.rates))), dense, routed, self.head[which])


def blocks(work: Work, constants: Constants, rates: Rates | None = None) -> Blocks:
    """rates: instead of those that the constants say."""
    rates = rates or Rates.of(constants, work)
    routed = block.cost(work, constants, rates, routed=True) if (work.experts > 0).any() else None
    return Blocks(rates, block.cost(work, constants, rates), routed, _head(work, constants, rates))


def cost(work: Work, constants: Constants, schedule: str = "1f1b", known: Blocks | None = None) -> Step:
    """schedule: of all candidates' pipelines, a name of `job.layout.SCHEDULES`; 1f1b is interleaved where a rank has
    several chunks. known: as `blocks` gives them."""
    known = known or blocks(work, constants)
    rates = known.rates
    passed, of_block, fsdp = _passes(work, constants, known)
    layer = passed.forward + passed.backward
    dearer = passed.leading_forward + passed.leading_backward - layer
    stages = _stages(work, layer, dearer, passed.head)
    batches = work.micro_batches
    steady = batches * stages.slowest
    bubble = np.where(work.pipeline > 1, _bubble(work, schedule, of_block, stages), 0.0)
    messages = _messages(work, rates)
    data = _data(work, constants, rates, of_block)
    optimizer = _optimizer(work, rates)
    share = np.where(layer > 0, steady / np.maximum(stages.slowest, 1e-30), 0.0)
    most = _layers(work)
    parts = {
        "tensor": share * most * of_block.tensor,
        "context": share * most * of_block.context,
        "fsdp": share * (most * (fsdp.forward + fsdp.backward)),
        "bubble": bubble,
        "messages": messages,
        "data": data,
        "optimizer": optimizer,
    }
    seconds = steady + bubble + messages + data + optimizer
    parts["compute"] = seconds - sum(parts.values())
    return Step(seconds, parts)


def gradients(work: Work, constants: Constants, known: Blocks, between: Rates) -> Array:
    """Seconds of reducing gradients that show, as in `cost`, of replicas that share no node and are joined by links of
    these rates."""
    return _data(work, constants, known.rates, _passes(work, constants, known)[1], between)


def passes(work: Work, constants: Constants, known: Blocks) -> Passes:
    """What `cost` makes its stages of."""
    return _passes(work, constants, known)[0]


def _passes(work: Work, constants: Constants, known: Blocks) -> tuple[Passes, Cost, _Fsdp]:
    """And what a block (with experts, where there are any) takes by itself, and what shows of FSDP in it."""
    plain, fsdp = known.dense, _fsdp(work, constants, known.rates, known.dense)
    head = known.head + fsdp.head
    leading = plain.forward + fsdp.forward, plain.backward + fsdp.backward
    if known.routed is None:
        return Passes(*leading, *leading, head), plain, fsdp
    some = work.experts > 0
    of_block = Cost(*(np.where(some, a, b) for a, b in zip(known.routed, plain, strict=True)))
    apart = _fsdp(work, constants, known.rates, of_block, routed=True)
    fsdp = _Fsdp(*(np.where(some, a, b) for a, b in zip(apart, fsdp, strict=True)))
    passed = Passes(of_block.forward + fsdp.forward, of_block.backward + fsdp.backward, *leading, head)
    return passed, of_block, fsdp


def _layers(work: Work) -> Array:
    """Of the fullest rank."""
    return np.ceil(work.layers / work.pipeline)


def _stages(work: Work, layer: Array, dearer: Array, head: Array) -> _Stages:
    """layer: seconds of each block but the leading ones, which take so much more (or less)."""
    most, alone, leading = _layers(work), work.pipeline == 1, work.leading
    full = most * layer
    held = np.clip(leading - most * (work.pipeline - 1), 0, most)
    last = np.maximum(work.layers - most * (work.pipeline - 1), 0) * layer + head + held * dearer
    last = np.where(alone, work.layers * layer + head + leading * dearer, last)
    # Of the others the first has most leading blocks, the last of them fewest.
    first = full + np.minimum(leading, most) * dearer
    other = full + np.clip(leading - most * np.maximum(work.pipeline - 2, 0), 0, most) * dearer
    slowest = np.where(alone, last, np.maximum(np.maximum(first, other), last))
    every = (work.pipeline - 1) * full + last + np.minimum(leading, most * (work.pipeline - 1)) * dearer
    return _Stages(slowest, np.where(alone, last, every))


def _bubble(work: Work, schedule: str, of_block: Cost, stages: _Stages) -> Array:
    """As `closed.bubble` says, exact where that is. Of schedules that split backward as `closed.zero_bubble` says, were
    gradients of inputs and of weights as dear as each other: of ZBV and DualPipeV an estimate; `timeline` simulates
    them."""
    waited = closed.bubble(work.chunks, stages.slowest, stages.all)
    if schedule == "looped_bfs":
        return waited + closed.around(work.pipeline, work.chunks, work.micro_batches, stages.slowest)
    if schedule not in _SPLIT:
        return waited
    forward = of_block.forward / np.maximum(of_block.forward + of_block.backward, 1e-30)
    half = (1 - forward) / 2
    return waited * closed.zero_bubble(2, forward, half, half)


def _head(work: Work, constants: Constants, rates: Rates) -> Array:
    """Output layer and loss, forward and backward, and the embedding, of a micro-batch."""
    odd, align = constants.shared("odd"), constants.shared("align")
    m_T, n, k = block.tokens(work), work.vocab / work.tensor, work.hidden
    zero = np.zeros(len(work))
    rows = products.aligned(n, k, odd, align)
    three = (
        products.seconds(work, rates, rows, m_T, n, k, zero)
        + products.seconds(work, rates, rows, m_T, k, n, zero)
        + products.seconds(work, rates, rows, n, k, m_T, zero)
    )
    # Logits, their softmax in fp32, its gradient: 20 bytes each. The embedding: 16 bytes a value.
    element = constants.shared("elem") / rates.memory
    return three + element * m_T * (20 * n + 16 * k) + np.where(work.tensor > 1, 3 * CALL, 0.0)


def _fsdp(work: Work, constants: Constants, rates: Rates, of_block: Cost, *, routed: bool = False) -> _Fsdp:
    """Weights of a block are gathered twice, its gradients scattered once (Rajbhandari et al. 2020; Zhao et al. 2023),
    of a micro-batch. Routed experts: over the ranks that have the same."""
    used = work.stage_zero == 3

    def exchanged(size: Array, ranks: Array, apart: Array) -> Array:
        """apart: ranks between two members."""
        ranks = np.where(used, ranks, 1.0)
        inside = ranks * apart <= work.per_node
        ring = collectives.bus(rates, inside, np.maximum(1.0, np.minimum(ranks, work.per_node / apart)))
        hops = np.where(inside, 0.0, HOP * ranks * apart / work.per_node)
        return collectives.scatter(size, ranks, ring, hops)

    own = (work.beside_experts if routed else work.block_parameters) / work.tensor
    gather = exchanged(own * 2, work.sharers, work.tensor)
    scatter = exchanged(own * work.gradient_bytes, work.sharers, work.tensor)
    if routed:
        own = work.experts / work.expert * work.expert_parameters
        gather = gather + exchanged(own * 2, work.expert_sharers, work.expert)
        scatter = scatter + exchanged(own * work.gradient_bytes, work.expert_sharers, work.expert)
    table, expose = work.vocab / work.tensor * work.hidden, constants.shared("expose")
    head = 2 * exchanged(table * 2, work.sharers, work.tensor)
    head = expose * (head + exchanged(table * work.gradient_bytes, work.sharers, work.tensor))
    forward = collectives.shown(gather, of_block.forward, expose)
    backward = collectives.shown(gather + scatter, of_block.backward, expose)
    return _Fsdp(*(np.where(used, part, 0.0) for part in (forward, backward, head)))


def _messages(work: Work, rates: Rates) -> Array:
    """Of a pipeline, on its critical path; of interleaved schedules that wait for what they send, all."""
    p, v, batches = work.pipeline, work.chunks, work.micro_batches
    one = message(work, rates)
    counted = np.where((v > 1) & (work.overlaps_messages == 0), 2 * v * batches, closed.messages(p, v, batches))
    return np.where(p > 1, counted * one, 0.0)


def message(work: Work, rates: Rates) -> Array:
    """Seconds from one stage to the next, of a micro-batch, (n,)."""
    size = block.tokens(work) * work.hidden * 2
    split = np.where((work.shards > 0) | (work.tensor > 1), work.tensor, 1.0)
    gathered = np.where((work.tensor > 1) & (work.shards == 0), size / rates.link, 0.0)
    found: Array = size / split / rates.nic + HOP + gathered
    return found


def owned(work: Work) -> Array:
    """Weights of the fullest rank but for routed experts, before any sharding."""
    most = np.ceil(work.layers / work.pipeline)
    routed = np.where(work.experts > 0, np.minimum(most, work.layers - work.dense_layers), 0.0)
    blocks = (most - routed) * work.block_parameters + routed * work.beside_experts
    return (blocks + work.vocab * work.hidden) / work.tensor


def owned_experts(work: Work) -> Array:
    """Weights of the routed experts of the rank that has most of them, before any sharding."""
    routed = np.minimum(np.ceil(work.layers / work.pipeline), work.layers - work.dense_layers)
    return np.where(work.experts > 0, routed * work.experts / work.expert * work.expert_parameters, 0.0)


def _data(work: Work, constants: Constants, rates: Rates, of_block: Cost, between: Rates | None = None) -> Array:
    """Reducing gradients once a step, gathering weights where ZeRO shares the optimizer (1) or gradients (2): what
    shows. ZeRO's sharers scatter and gather; replicas add up what each of these has, beside."""
    own, routed = owned(work), owned_experts(work)
    reduced, gathered = _reduced(work, rates, own, work.sharers, work.tensor, between)
    if (routed > 0).any():
        parts = _reduced(work, rates, routed, work.expert_sharers, work.expert, between)
        reduced, gathered = reduced + parts[0], gathered + parts[1]
    expose, most = constants.shared("expose") / 2, _layers(work)
    under = collectives.shown(reduced, most * of_block.backward, expose)
    under = under + collectives.shown(gathered, most * of_block.forward, expose)
    return np.where(work.overlaps_data > 0, under, reduced + gathered) * (reduced + gathered > 0)


def _reduced(
    work: Work, rates: Rates, own: Array, sharers: Array, apart: Array, between: Rates | None
) -> tuple[Array, Array]:
    """Seconds of reducing the gradients of `own` weights, and of the way back: gathering what is reduced, or weights.
    apart: ranks between two sharers."""
    shared = (work.stage_zero >= 1) & (work.stage_zero < 3)
    spread = np.where(shared, sharers, 1.0)
    inside = apart * work.context * np.where(shared, work.fsdp, 1.0) <= work.per_node
    same = np.maximum(1.0, np.floor(work.per_node / (work.tensor * work.context)))
    ring = collectives.bus(rates, inside, np.minimum(same, spread))
    hops = np.where(inside, CALL, 2 * HOP * np.log2(np.maximum(spread, 2)))
    # Where gradients are kept sharded, each micro-batch's are scattered.
    often = np.where((work.stage_zero == 2) & (work.gathers_once > 0), work.micro_batches, 1.0)
    scattered = often * collectives.scatter(own * work.gradient_bytes, spread, ring, hops)
    back = collectives.scatter(own * 2.0, spread, ring, hops)

    replicas, ring, hops = across(work, rates) if between is None else across(work, between, apart=True)
    own = own / np.where(work.zero > 0, sharers, 1.0)
    there, again = (
        np.where(size > 0, collectives.scatter(own * size, replicas, ring, hops), 0.0)
        for size in (work.sent, work.returned)
    )
    whole = np.where(work.reduces_whole > 0, 2.0, 1.0)
    return whole * (scattered + there), back + again


def across(work: Work, rates: Rates, apart: bool = False) -> tuple[Array, Array, Array]:
    """Of a ring of those ranks of all replicas that have the same weights: (how many, bytes/s of one, seconds of
    latency). apart: not all are in one node, however few."""
    replicas = np.where(work.zero > 0, work.data / work.fsdp, work.data)
    inside = (work.tensor * work.context * work.data <= work.per_node) & (not apart)
    ring = collectives.bus(rates, inside, members(work))
    return replicas, ring, np.where(inside, CALL, 2 * HOP * np.log2(np.maximum(work.data, 2)))


def members(work: Work) -> Array:
    """Ranks of such a ring that are in a node, where it is larger than that."""
    shared = (work.stage_zero >= 1) & (work.stage_zero < 3)
    same = np.maximum(1.0, np.floor(work.per_node / (work.tensor * work.context)))
    return np.minimum(np.where(shared, 1.0, same), work.data)


def _optimizer(work: Work, rates: Rates) -> Array:
    def moved(own: Array, sharers: Array) -> Array:
        weights = own / np.where(work.stage_zero == 3, sharers, 1.0)
        return own / np.where(work.zero >= 1, sharers, 1.0) * _OPTIMIZER + weights * _WEIGHT

    seconds: Array = moved(owned(work), work.sharers) / rates.memory + _LAUNCHES * rates.host
    return seconds + moved(owned_experts(work), work.expert_sharers) / rates.memory
