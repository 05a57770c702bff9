"""Records of steps that are wrong in a known way, in every layout but one process's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shoal.job import parse
from shoal.mesh import Seat
from shoal.training import equality


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


def raises_in_fsdp(seat: Seat, **args: Any) -> dict[str, Any]:
    layout = parse(args["job"]).layout
    assert layout is not None
    if layout.fsdp > 1:
        raise ValueError("planted")
    return equality.record(seat, **args)


def learns_nothing(seat: Seat, **args: Any) -> dict[str, Any]:
    result = equality.record(seat, **args)
    return {**result, "losses": [1.0] * len(result["losses"])}
