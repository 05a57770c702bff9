"""What replicas exchange beside a step: sums with a codec, local steps, gossip, a parameter server.

Sums of plain gradients are in `step`; here is what another sync has in their place. What a sync loses in learning (loss
at the same number of tokens) is in none of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shoal.planning import codecs, collectives, step
from shoal.planning.constants import HOP, Constants, Rates
from shoal.planning.plan import Question
from shoal.planning.step import Step
from shoal.planning.work import Array, Work

# Bytes through memory, of each number. What comes of all replicas is added up; numbers are copied in and out; what a
# codec lost is added and taken off again. Of an outer step (`sync.fragment`, tests count it), of a
# meeting of two (`sync.gossip`).
_ADDED, _COPIED, _FED, _OUTER, _MET = 12.0, 20.0, 24.0, 190.0, 230.0
# Of a server: adding a gradient up, AdamW's update, and the copy that is pulled from.
_UPDATED = 28.0 + 8.0
SERVER_MEMORY = 2 * 8 * 3.2e9
"""Bytes/s of a server's memory: two channels of DDR4-3200. Assumed: no cluster's description says it."""
ASYNCHRONOUS = ("asp", "ssp")
"""Modes of the server in which each worker's gradient is an update."""
# Steps of a shadow that a shard keeps; messages of a push and a pull that wait for each other.
_STEPS, _MESSAGES = 16, 4


def plain(question: Question) -> bool:
    """Gradients are added up each step, as they are: nothing is exchanged beside a step."""
    return question.sync.name == "allreduce" and codecs.of(question.sync.codec) == codecs.PLAIN


def columns(question: Question, replicas: Array) -> dict[str, Array]:
    """Of so many replicas, (n,), what `work.SYNC` names, but where `plain`."""
    sync, codec, several = question.sync, codecs.of(question.sync.codec), replicas > 1
    fed = sync.feedback and codec != codecs.PLAIN
    # What is lost of a rank's own numbers, and of the sums that it owns.
    lost = 4 * (1 + 1 / replicas) * fed
    sent, moments = 0.0, 12.0
    if sync.name == "allreduce":
        sent, synced = codec.size, several * (2 * codec.size + 2 * lost)
    elif sync.name == "local":
        synced = 8 + 4 / sync.fragments + several * (2 * codec.size / sync.fragments + lost * (1 + 1 / sync.fragments))
    elif sync.name == "gossip":
        synced = np.full(len(replicas), 8.0 + 24.0)
    else:
        own_steps = question.server.local_steps > 1
        moments = 12.0 if own_steps else 4.0
        synced = np.full(len(replicas), 4.0 * own_steps + 8.0 * fed + 4.0 * (codec != codecs.PLAIN))
    same = {"sent": sent, "returned": 0.0, "moments": moments}
    return {name: np.full(len(replicas), value) for name, value in same.items()} | {"synced": synced}


def staleness(question: Question, replicas: int) -> float:
    """Updates between a worker's pull and its push, expected of workers that are equally fast: one of each other."""
    return replicas - 1.0 if question.sync.name == "server" and question.server.mode in ASYNCHRONOUS else 0.0


def exchanged(
    found: Step, work: Work, constants: Constants, rates: Rates, question: Question, servers: float = 1.0
) -> Step:
    """found: without what replicas exchange, but for gradients sent during backward. servers: how many times as fast
    as usual their memory is. What is exchanged is part `sync` of the step."""
    if plain(question):
        return found
    parts = dict(found.parts)
    if question.sync.name == "server" and question.server.local_steps == 1:
        parts["optimizer"] = np.zeros(len(work))
    before = np.asarray(sum(parts.values()), dtype=np.float64)
    way = _way(work, rates, question)
    if question.sync.name == "server":
        parts["sync"] = _served(way, before, rates, question, servers)
    else:
        made = {"allreduce": _summed, "local": _apart, "gossip": _met}[question.sync.name]
        parts["sync"] = np.asarray(made(way, before, constants.shared("expose") / 2, question))
    return Step(before + parts["sync"], parts)


def least(question: Question, rates: Rates) -> float:
    """Seconds of a step that no layout's exchange is under: numbers through all servers, of one worker; in rounds, of
    as many as are asked for."""
    if question.sync.name != "server":
        return 0.0
    codec, of_server = codecs.of(question.sync.codec), question.server
    numbers = question.shape.parameters / of_server.shards
    workers = max(1, question.replicas) if _in_rounds(question) else 1
    link = workers * (codec.size + min(4.0, codec.size)) / float(rates.nic[0])
    return numbers * (link + (workers * _ADDED + _UPDATED) / SERVER_MEMORY) / of_server.local_steps


def _in_rounds(question: Question) -> bool:
    """Workers wait for each other."""
    return question.server.mode not in ASYNCHRONOUS


class _Way(NamedTuple):
    """own: numbers that a rank exchanges. cut: a whole matrix's numbers for one of these. coded: seconds of a rank for
    an exchange in which all add up. hop: of the way to whoever adds up, and of the way back. memory: bytes/s."""

    replicas: Array
    own: Array
    cut: Array
    hop: Array
    coded: Array
    memory: Array
    near: Array


def _way(work: Work, rates: Rates, question: Question) -> _Way:
    sync, codec = question.sync, codecs.of(question.sync.codec)
    shared = work.zero > 0
    own = step.owned(work) / np.where(shared, work.sharers, 1.0)
    own = own + step.owned_experts(work) / np.where(shared, work.expert_sharers, 1.0)
    replicas, ring, hops = step.across(work, rates)
    fed = sync.feedback and codec != codecs.PLAIN
    each = codec.encode + codec.decode + fed * (codec.decode + _FED)
    moved = each * (1 + 1 / replicas) + _ADDED + _COPIED
    return _Way(
        replicas, own, work.tensor * np.where(shared, work.sharers, 1.0),
        collectives.scatter(own * codec.size, replicas, ring, hops),
        np.where(replicas > 1, own * moved / rates.memory, 0.0), rates.memory + np.zeros(len(work)),
        np.where(work.devices <= work.per_node, rates.link, rates.nic),
    )  # fmt: skip


def _summed(way: _Way, before: Array, expose: float, question: Question) -> Array:
    """The way there is during backward, in `step`; the way back waits until all of it has come."""
    return way.hop + way.coded


def _apart(way: _Way, before: Array, expose: float, question: Question) -> Array:
    """Douillard et al. 2023; 2025 for parts that are on their way while training goes on: half of the delay there, half
    of it back (`sync.rounds`)."""
    sync = question.sync
    back = sync.delay // 2
    waited = sum(
        collectives.shown(way.hop / sync.fragments, steps * before, expose) for steps in (sync.delay - back, back)
    )
    outer = way.own * _OUTER / way.memory
    return np.asarray((sync.fragments * waited + way.coded + outer) / sync.every)


def _met(way: _Way, before: Array, expose: float, question: Question) -> Array:
    """Two send each other how far they have moved, and their slow weights."""
    message = np.where(way.replicas > 1, way.own * 8 / way.near + HOP, 0.0)
    return np.asarray((message + way.own * _MET / way.memory) / question.sync.every)


class Turn(NamedTuple):
    """Seconds of a worker's push and pull, (n,) each. coded: on the worker, coding and messages. own_there, own_back:
    through the link of one of its ranks; there, back: through a server's. added: in a server's memory, of a gradient;
    updated: of an update."""

    coded: Array
    own_there: Array
    own_back: Array
    there: Array
    back: Array
    added: Array
    updated: Array


def turn(work: Work, rates: Rates, question: Question, servers: float = 1.0) -> Turn:
    """servers: how many times as fast as usual their memory is."""
    return _turn(_way(work, rates, question), rates, question, servers)


def _turn(way: _Way, rates: Rates, question: Question, servers: float) -> Turn:
    codec, sync = codecs.of(question.sync.codec), question.sync
    numbers, workers = question.shape.parameters / question.server.shards, way.replicas
    # What is pulled: a step of the shadow for each update since; or all, where that is fewer bytes.
    steps = np.where(_in_rounds(question), 1.0, workers)
    written = np.where(steps > _STEPS, np.inf, steps * codec.size * way.cut)
    pulled = np.minimum(4.0, written)
    decoded = np.where(written < 4.0, steps * way.cut * (codec.decode + _ADDED), 0.0) * (codec != codecs.PLAIN)
    fed = sync.feedback and codec != codecs.PLAIN
    coded = way.own * (codec.encode + fed * (codec.decode + _FED) + decoded) / way.memory
    there, back = (numbers * size / rates.nic + np.zeros(len(workers)) for size in (codec.size, pulled))
    own_there, own_back = way.own * codec.size / rates.nic, way.own * pulled / rates.nic
    shadow = (codec.encode + codec.decode + _ADDED) * (codec != codecs.PLAIN)
    each = numbers / (SERVER_MEMORY * servers) + np.zeros(len(workers))
    return Turn(
        coded + _MESSAGES * HOP, own_there, own_back, there, back, each * (_ADDED + codec.decode),
        each * (_UPDATED + shadow),
    )  # fmt: skip


def _served(way: _Way, before: Array, rates: Rates, question: Question, servers: float) -> Array:
    """All workers push to all shards, each shard's link as a device's between nodes.

    Rounds: one after another, all push, shards update, all pull. Without them: no worker's cycle is shorter than its
    own way, nor than what the busiest of servers' links and memory has to do for all of them (operational analysis:
    Denning and Buzen 1978; equal workers reach the larger of both).
    """
    of_server, waits, workers = question.server, _in_rounds(question), way.replicas
    one = _turn(way, rates, question, servers)
    at_once = workers if waits else 1.0
    update = at_once * one.added + one.updated
    way_there, way_back = np.maximum(one.own_there, at_once * one.there), np.maximum(one.own_back, at_once * one.back)
    once = way_there + update + way_back + one.coded
    cycle = before * of_server.local_steps + once
    if not waits:
        cycle = np.maximum(cycle, workers * np.maximum(np.maximum(one.there, one.back), update))
    return np.asarray(cycle / of_server.local_steps - before)
