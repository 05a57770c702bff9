"""`codec = auto`: what is chosen from what was measured, and that all ranks choose alike."""

from __future__ import annotations

import types

import pytest

from shoal.job import Layout
from shoal.job.sync import SyncOptions
from shoal.sync import choose


def mesh(layout: str = "replicas=4", neighbours: int = 1):
    seat = types.SimpleNamespace(neighbours=neighbours, world=4)
    return types.SimpleNamespace(layout=Layout.parse(layout), seat=seat)


def network(monkeypatch, seconds: dict[str, float], latency: float = 0.0) -> list[int]:
    """Where an exchange takes so many seconds a number; which sizes were tried."""
    tried: list[int] = []

    def agreed(mesh, operation, size):
        tried.append(size)
        codec = operation.args[1].codec if len(operation.args) > 1 else None
        return latency + size * seconds["none" if codec is None else type(codec).__name__]

    monkeypatch.setattr(choose, "_agreed", agreed)
    return tried


@pytest.mark.parametrize(
    ("int8", "bf16", "chosen"),
    [(0.26, 0.5, "int8"), (0.69, 0.71, "int8"), (0.9, 0.6, "bf16"), (0.71, 0.71, "none"), (1.5, 1.2, "none")],
)
def test_what_saves_most_if_that_is_worth_it(monkeypatch, int8, bf16, chosen):
    tried = network(monkeypatch, {"none": 1e-6, "Bf16": bf16 * 1e-6, "Integers": int8 * 1e-6})
    said: list[str] = []
    assert choose.choose(SyncOptions(), mesh(), 10_000_000, said.append) == chosen
    # 0.26 s at 2¹⁸ numbers: long enough.
    assert tried == [1 << 14, 1 << 16, 1 << 18, 1 << 18, 1 << 18]
    (line,) = said
    assert line.startswith(f"codec {chosen}: ")
    assert "none 10.0 s, bf16 " in line


def test_without_feedback_nothing_below_16_bits(monkeypatch):
    network(monkeypatch, {"none": 1e-6, "Bf16": 0.5e-6})
    assert choose.choose(SyncOptions(feedback=False), mesh(), 1000, lambda line: None) == "bf16"


@pytest.mark.parametrize(
    ("given", "reason"), [({"neighbours": 4}, "on this machine"), ({"layout": "fsdp=4"}, "one replica")]
)
def test_where_there_is_nothing_to_gain_nothing_is_tried(monkeypatch, given, reason):
    monkeypatch.delattr(choose, "_agreed")
    said: list[str] = []
    assert choose.choose(SyncOptions(), mesh(**given), 1000, said.append) == "none"
    assert reason in said[0]


def test_all_ranks_choose_alike_by_what_they_measure(ranks):
    """On loopback, as if every rank were a machine of its own."""
    told = ranks.run("tests.sync.choose_cases:chosen", 3, numbers=100_000)
    assert told[0] == told[1] == told[2]
    codec, (line,) = told[0]
    assert line.startswith(f"codec {codec}: an exchange between replicas would take none ")
