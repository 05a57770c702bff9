"""What replicas that differ save of their own, and who goes on from it where their number has changed.

The weights that all have in common keep their names, so that whoever reads a checkpoint (another sync, an export,
`shoal generate`) finds a model. What replica 2 has of its own is `weight@2.<name>`, `exp_avg@2.<name>` and so on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from shoal.optim.update import Update, is_outer
from shoal.parallel.replica import Replica
from shoal.shard import Shard

WEIGHT = "weight"


def replicas_apart(values: dict[str, Any]) -> int:
    """How many replicas have saved state of their own; 0 where all were equal. values: of the checkpoint."""
    return int(values.get("sync", {}).get("apart", 0))


def own(replica: int, shards: Iterable[Shard]) -> list[Shard]:
    """`<slot>.<name>` as what this replica alone has: each of its ranks saves what it counts."""
    named = []
    for shard in shards:
        slot, _, name = shard.name.partition(".")
        named.append(replace(shard, name=f"{slot}@{replica}.{name}", grad=None, owner=shard.counted))
    return named


def weights_of(replica: int, shards: Iterable[Shard]) -> list[Shard]:
    """The weights that this replica alone has."""
    return own(replica, (replace(shard, name=f"{WEIGHT}.{shard.name}") for shard in shards))


def equal(replica: Replica[Any], update: Update, values: dict[str, Any]) -> list[Shard]:
    """What replicas that are equal want of a checkpoint: of those that were apart, what they had in common, and the
    optimizer's state of the first."""
    return [*replica.held(), *moments(update.state(), values, outer=False)]


def moments(slots: list[Shard], values: dict[str, Any], outer: bool) -> list[Shard]:
    """An optimizer's state as a checkpoint has it: of replicas that were apart that of the first, and nothing where it
    is of an optimizer of the other kind. outer: as in `begins_anew`."""
    if begins_anew(values, outer):
        return []
    return own(0, slots) if replicas_apart(values) else slots


def begins_anew(values: dict[str, Any], outer: bool) -> str:
    """Why the optimizer's state begins with nothing where the weights go on, empty where it goes on, too.

    outer: the job's optimizer is an outer one, on a server whose workers take steps with one of their own: of the two,
    neither's moments mean anything to the other, though some have one name. values: of the checkpoint.
    """
    if is_outer(values["update"]) == outer:
        return ""
    of = "of steps without an outer one" if outer else "of an outer one, of workers that took steps of their own"
    return f"the optimizer's state begins with nothing: that in the checkpoint is {of} (server.local_steps)"
