"""Who meets whom when replicas average in pairs: another matching every round, known to all without a word."""

from __future__ import annotations

import random


def partner(seed: int, meeting: int, replicas: int, replica: int) -> int | None:
    """Of this replica in this meeting (from 0); None where their number is odd and this one is left over."""
    order = list(range(replicas))
    random.Random(f"{seed} {meeting}").shuffle(order)
    place = order.index(replica) ^ 1
    return order[place] if place < replicas else None


def heard_by_all(seed: int, meeting: int, replicas: int, replica: int) -> int:
    """The first meeting after which every replica has heard, through others, what this one says in that meeting."""
    told = {replica}
    while True:
        told |= {p for one in told if (p := partner(seed, meeting, replicas, one)) is not None}
        if len(told) == replicas:
            return meeting
        meeting += 1
