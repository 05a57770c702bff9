"""Rows of metrics as a trainer writes them, for the tests of this room."""

from __future__ import annotations

from typing import Any


def row(step: int, **changes: Any) -> dict[str, Any]:
    """A step of 0.5 s and 1000 tokens, whose other figures follow from its number."""
    figures = {
        "step": step,
        "loss": 8.0 - 0.01 * step,
        "grad_norm": 1.0 + 1 / step,
        "lr": 1e-3,
        "tokens": 1000,
        "tokens_per_second": 2000.0,
        "seconds": 0.5,
        "memory_gib": 1.25,
        "data_s": 0.01,
        "forward_s": 0.15,
        "backward_s": 0.3,
        "communication_s": 0.02,
        "optimizer_s": 0.02,
        "sent_bytes": 2_000_000,
        "received_bytes": 3_000_000,
    }
    return figures | changes


def waiting_row(step: int, *waited: float, **changes: Any) -> dict[str, Any]:
    """A step of 0.5 s in which replicas told how long each waited."""
    return row(step, waited_s={str(replica): seconds for replica, seconds in enumerate(waited)}, **changes)


def server_row(step: int, late: dict[int, int], **changes: Any) -> dict[str, Any]:
    """A step of a parameter server: 0.5 s and 1000 tokens in gradients of so many at each staleness."""
    figures = {
        "step": step,
        "loss": 8.0 - 0.01 * step,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens": 1000,
        "tokens_per_second": 2000.0,
        "seconds": 0.5,
        "memory_gib": 1.25,
        "compute_s": 0.3,
        "communication_s": 0.1,
        "sent_bytes": 2_000_000,
        "received_bytes": 3_000_000,
        "version": step,
        "commits": sum(late.values()),
        "rejected": 0,
        "staleness": {str(each): count for each, count in late.items()},
        "waited_s": {"0": 0.1, "1": 0.2},
    }
    return figures | changes
