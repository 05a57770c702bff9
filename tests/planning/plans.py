"""Plans of the tests' own making, in place of a search: every figure a simple one that a test can foretell."""

from __future__ import annotations

from typing import Any

from shoal.job.layout import Layout
from shoal.planning.plan import Answer, Plan, Question


def plan(layout: str, seconds: float, gib: float = 40.0, capacity: float = 80.0, **changes: Any) -> Plan:
    """Computing takes 3/4 of a step, the pipeline's bubble the rest; weights take 3/4 of the memory."""
    values: dict[str, Any] = {
        "chunks": 1, "low": 0.8 * seconds, "high": 1.25 * seconds, "tokens_per_second": 1e6 / seconds,
        "per_device": 1e5 / seconds, "mfu": 0.4, "memory": {"weights": 0.75 * gib * 2**30, "buffers": gib * 2**28},
        "capacity": capacity * 2**30, "parts": {"compute": 0.75 * seconds, "bubble": 0.25 * seconds, "expert": 0.0},
        "bubble": 0.25, "exposed": 0.125, "limit": "compute", "cost": None, "days": None,
    }  # fmt: skip
    return Plan(Layout.parse(layout), seconds=seconds, **values | changes)


def search(question: Question, best: int = 10, alike: bool = True) -> Answer:
    """A device holds 2 bytes of each parameter and token's sequence; whole replicas, or fsdp over all."""
    devices, pool = question.cluster.count, question.cluster.pools[0]
    need = 2.0 * question.shape.parameters + 1e5 * question.sequence * question.shape.layers
    price = None if question.cluster.price is None else question.cluster.price / 3.6
    days = None if question.tokens is None else question.tokens / 8.64e10
    found = [
        plan(f"{axis}={devices}", 1 + slower, need / share / 2**30, pool.device.memory / 2**30, cost=price, days=days)
        for slower, (axis, share) in enumerate((("replicas", 1), ("fsdp", devices)))
        if question.global_batch % devices == 0
    ]
    fits = tuple(p for p in found if p.total * 1.1 <= p.capacity)
    nearest = min(found, key=lambda p: p.total, default=None)
    return Answer(fits[:best], 0.01, len(found), len(fits), None if fits else nearest)
