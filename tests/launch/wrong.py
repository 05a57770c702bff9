"""Records of steps that are wrong in a known way, in every layout but one process's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.job import parse
from shoal.mesh import Seat
from shoal.training import equality
from tests.equivalence import bugs

NORM = "model.layers.1.input_layernorm.weight"


def label(seat: Seat, **args: Any) -> dict[str, Any]:
    """One label of each micro-batch is another one."""

    def change(batch):
        labels = batch.labels_BL.clone()
        labels[0, 0] = (labels[0, 0] + 1) % 7
        return replace(batch, labels_BL=labels)

    return _changed(seat, change, **args)


def sample(seat: Seat, **args: Any) -> dict[str, Any]:
    """Every reader claims to read the first sample."""
    return _changed(seat, lambda batch: replace(batch, sample_B=batch.sample_B * 0), **args)


def _changed(seat: Seat, change, **args: Any) -> dict[str, Any]:
    if seat.world == 1:
        return equality.record(seat, **args)
    batches = equality._batches
    equality._batches = lambda *a: [change(batch) for batch in batches(*a)]
    try:
        return equality.record(seat, **args)
    finally:
        equality._batches = batches


def norm_not_summed(seat: Seat, **args: Any) -> dict[str, Any]:
    """Each tensor rank has the gradient of a norm's weight that comes of its own positions."""
    return _planted(seat, lambda parts: bugs.plant(parts, "norm weight not summed"), **args)


def norm_averaged(seat: Seat, **args: Any) -> dict[str, Any]:
    """The gradient of a norm's weight is the mean over two tensor ranks, not their sum."""
    return _planted(seat, lambda parts: _scale(parts, NORM, 0, 0.5), **args)


def norm_turned_later(seat: Seat, **args: Any) -> dict[str, Any]:
    """From the second step on, the gradient of one norm's weight has the other sign: no gradient norm shows it."""
    return _planted(seat, lambda parts: _scale(parts, NORM, 1, -1.0), **args)


def _scale(parts, name: str, first: int, factor: float) -> None:
    collect = parts.replica.collect

    def wrong():
        shards = collect()
        if parts.update.done >= first:
            for shard in shards:
                if shard.name == name and shard.grad is not None:
                    shard.grad.mul_(factor)
        return shards

    parts.replica.collect = wrong


def _planted(seat: Seat, plant, **args: Any) -> dict[str, Any]:
    if seat.world == 1:
        return equality.record(seat, **args)
    assemble = equality.assemble

    def wrong(*a):
        parts = assemble(*a)
        plant(parts)
        return parts

    equality.assemble = wrong
    try:
        return equality.record(seat, **args)
    finally:
        equality.assemble = assemble


# Bugs of tests/equivalence, and the axis along which each can happen.
AXIS_OF = {
    "tied gradient added twice": "pipeline",
    "key heads counted twice": "tensor",
    "ring off by one chunk": "context",
    "balance loss of the row on each rank": "context",
}


def tied_added_twice(seat: Seat, **args: Any) -> dict[str, Any]:
    return _along_its_axis(seat, "tied gradient added twice", **args)


def keys_counted_twice(seat: Seat, **args: Any) -> dict[str, Any]:
    """Every rank counts the key heads that several hold into the gradient's norm."""
    return _along_its_axis(seat, "key heads counted twice", **args)


def ring_off(seat: Seat, **args: Any) -> dict[str, Any]:
    return _along_its_axis(seat, "ring off by one chunk", **args)


def balance_of_a_rank(seat: Seat, **args: Any) -> dict[str, Any]:
    """The auxiliary loss is added whole by each rank that has a part of the row."""
    return _along_its_axis(seat, "balance loss of the row on each rank", **args)


def _along_its_axis(seat: Seat, bug: str, **args: Any) -> dict[str, Any]:
    if getattr(parse(args["job"]).layout, AXIS_OF[bug]) == 1:
        return equality.record(seat, **args)
    return _planted(seat, lambda parts: bugs.plant(parts, bug), **args)


def raises_in_fsdp(seat: Seat, **args: Any) -> dict[str, Any]:
    layout = parse(args["job"]).layout
    assert layout is not None
    if layout.fsdp > 1:
        raise ValueError("planted")
    return equality.record(seat, **args)


def learns_nothing(seat: Seat, **args: Any) -> dict[str, Any]:
    result = equality.record(seat, **args)
    return {**result, "losses": [1.0] * len(result["losses"])}


def learns_nothing_with_sgd(seat: Seat, **args: Any) -> dict[str, Any]:
    return (learns_nothing if parse(args["job"]).optim.name == "sgd" else equality.record)(seat, **args)


def ends_early(seat: Seat, **args: Any) -> dict[str, Any]:
    result = equality.record(seat, **args)
    return result if seat.world == 1 else {**result, "losses": result["losses"][:-1]}
