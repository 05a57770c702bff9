"""How long ranks of a group take to exchange: latency and bandwidth by where the group lies (Thakur et al. 2005).

A group that lies within a node has its links; one that does not has the network, a ring over all of it the network
cards of all its members in a node.
"""

from __future__ import annotations

import numpy as np

from shoal.planning.constants import CALL, HOP, Rates
from shoal.planning.work import Array, Flags


def scatter(size: Array, ranks: Array, bus: Array, hops: Array) -> Array:
    """A reduce-scatter, or an all-gather, of `size` bytes in all by a ring. bus: bytes/s of a member. hops: seconds of
    latency beyond a call's own. An all-reduce is two of these."""
    return np.where(ranks > 1, (ranks - 1) / ranks * size / bus + CALL + hops, 0.0)


def bus(rates: Rates, inside: Flags, members: Array) -> Array:
    """Bytes/s of a ring. inside: whether it lies in a node. members: of it in a node, where it does not."""
    return np.where(inside, rates.link, np.minimum(rates.link, rates.nic * members))


def shown(communication: Array, under: Array, expose: float) -> Array:
    """Of communication under computing: what sticks out, and the share that it takes from computing."""
    return np.maximum(0.0, communication - under) + expose * np.minimum(communication, under)


def all_to_all(rates: Rates, size: Array, ranks: Array, per_node: Array) -> Array:
    """Each of the ranks sends an equal part of its `size` bytes to each: those to other nodes by its own network card,
    beside those within its node. The group lies on neighbouring ranks."""
    near = np.minimum(ranks, per_node)
    within, beyond = size * (near - 1) / ranks / rates.link, size * (ranks - near) / ranks / rates.nic
    hop = np.where(ranks > per_node, HOP * np.ceil(ranks / per_node), 0.0)
    return np.where(ranks > 1, np.maximum(within, beyond) + CALL + hop, 0.0)
