"""Where no layout fits: how far the nearest is from it, and what would make one fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from shoal.errors import JobError
from shoal.planning import cluster, devices
from shoal.planning.plan import Answer, Question
from shoal.planning.search import search

_GIB = 2.0**30
# Share of a device's memory that is kept free of what is predicted; the search's.
_SPARE = 1.10
# Larger clusters that are tried; larger devices; halvings of the sequence.
_CLUSTERS, _DEVICES, _HALVINGS = 24, 6, 6
# Devices that a cluster of whatever size is tried with: more than any that has been built.
_MOST = 2**20


def refusal(question: Question, answer: Answer) -> JobError:
    """answer: of the question, without plans."""
    pool, shape = question.cluster.pools[0], question.shape
    near = answer.nearest
    if near is None:
        what = (
            f"no layout of {question.cluster.count} devices can share {shape.name}'s blocks and heads and a batch of "
            f"{question.global_batch} sequences"
        )
    else:
        part = max(near.memory, key=lambda name: near.memory[name])
        what = (
            f"{shape.name} fits in no layout on {question.cluster.name}: the nearest, {near.layout}, needs "
            f"{near.total * _SPARE / _GIB:.4g} GiB of a device (a tenth to spare), and {pool.device.name} has "
            f"{near.capacity / _GIB:.4g}; most of it is {part}, {near.memory[part] / _GIB:.4g} GiB"
        )
    changes = [*([_batch(question)] if near is None else []), *_changes(question)]
    return JobError(what, fix="; or ".join(filter(None, changes)))


def _changes(question: Question) -> Iterator[str]:
    """What would make it fit, each by itself, tried; where nothing does by itself, another device in another number."""
    pool = question.cluster.pools[0]
    count, device, length = _smallest(question), _larger_device(question), _shorter(question)
    if count:
        yield f"{count} {pool.device.name} would do, the smallest of the clusters tried (of full nodes)"
    if device:
        yield f"as many {device.name} ({device.memory / _GIB:.4g} GiB each)"
    if length:
        yield f"--sequence {length}"
    if not (count or device or length):
        yield _another(question) or "a smaller model: no larger cluster and no larger device that was tried would do"


def _another(question: Question) -> str:
    """The smallest cluster of the first of the larger devices of which any does."""
    for device in _larger_devices(question):
        one = replace(question.cluster, pools=(cluster.usual(device.name, device, 1),))
        if count := _smallest(replace(question, cluster=one)):
            return f"{count} {device.name} would do ({device.memory / _GIB:.4g} GiB each)"
    return ""


def _batch(question: Question) -> str:
    """The nearest batch of which all devices can have as much, if it would do."""
    devices, asked = question.cluster.count, question.global_batch
    multiples = {max(1, asked // devices) * devices, -(-asked // devices) * devices}
    for batch in sorted(multiples - {asked}, key=lambda n: abs(n - asked)):
        if _fits(replace(question, global_batch=batch)):
            return f"--global-batch {batch}"
    return ""


def _fits(question: Question) -> bool:
    try:
        return bool(search(question, best=1).plans)
    except JobError:  # a cluster that the search refuses
        return False


def _smallest(question: Question) -> int | None:
    """Devices of the smallest cluster that would do."""
    pool = question.cluster.pools[0]
    for count in _sizes(question):
        # Part of a node has the links of a full one.
        each = cluster.nodes_of("count", count, None, max(pool.per_node, pool.device.per_node), pool.device.tray)
        larger = replace(pool, count=count, per_node=each)
        if _fits(replace(question, cluster=replace(question.cluster, pools=(larger,)))):
            return count
    return None


def _sizes(question: Question) -> list[int]:
    """Counts above the cluster's: parts of a node, then 1, 2, 3, 4, 6, 8, 12 … nodes, which layouts can share."""
    pool = question.cluster.pools[0]
    node = max(pool.per_node, pool.device.per_node)
    if pool.device.tray:
        node = 1 << node.bit_length() - 1  # 64 of 72
    parts = [2**n for n in range(node.bit_length()) if 2**n < node]
    nodes = sorted({node * step * 2**n for step in (1, 3) for n in range(_MOST.bit_length())})
    return [count for count in (*parts, *nodes) if pool.count < count <= _MOST][:_CLUSTERS]


def _larger_devices(question: Question) -> list[devices.Device]:
    """Of the catalogue, one of each size of memory: of the same maker first, then those with least memory."""
    own = question.cluster.pools[0].device
    larger = {
        (d.vendor != own.vendor, d.memory): d
        for d in reversed(list(devices.catalogue().values()))
        if d.memory > own.memory
    }
    return [larger[key] for key in sorted(larger)][:_DEVICES]


def _larger_device(question: Question) -> devices.Device | None:
    """The first of these of which as many would do."""
    pool = question.cluster.pools[0]
    for device in _larger_devices(question):
        try:
            other = cluster.usual(pool.name, device, pool.count)
        except JobError:  # its nodes would not be full
            continue
        if _fits(replace(question, cluster=replace(question.cluster, pools=(other,)))):
            return device
    return None


def _shorter(question: Question) -> int | None:
    """Tokens of the longest sequence that would do, halved again and again; as many tokens in a step."""
    for n in range(1, _HALVINGS + 1):
        length = question.sequence // 2**n
        if length * 2**n != question.sequence:
            return None
        if _fits(replace(question, sequence=length, global_batch=question.global_batch * 2**n)):
            return length
    return None
