"""`codec = auto`: what is chosen from what was measured, and that all ranks choose alike."""

from __future__ import annotations

import types

import pytest

from shoal.job import Layout
from shoal.sync import choose


def mesh(layout: str = "replicas=4", neighbours: int = 1):
    seat = types.SimpleNamespace(neighbours=neighbours, world=4)
    return types.SimpleNamespace(layout=Layout.parse(layout), seat=seat)


def network(monkeypatch, seconds: dict[str, float]) -> list[tuple[str, int]]:
    """Where an exchange takes so many seconds a number; what was tried."""
    tried: list[tuple[str, int]] = []

    def trial(mesh, operation, size):
        codec = operation.args[1].codec if len(operation.args) > 1 else None
        name = "none" if codec is None else type(codec).__name__
        tried.append((name, size))
        return size * seconds[name]

    monkeypatch.setattr(choose, "_trial", trial)
    return tried


@pytest.mark.parametrize(
    ("int8", "bf16", "chosen"),
    [(0.26, 0.5, "int8"), (0.69, 0.5, "int8"), (0.9, 0.6, "bf16"), (0.71, 0.71, "none"), (1.5, 1.2, "none")],
)
def test_the_first_that_saves_enough(monkeypatch, int8, bf16, chosen):
    tried = network(monkeypatch, {"none": 1e-6, "Bf16": bf16 * 1e-6, "Integers": int8 * 1e-6})
    said: list[str] = []
    assert choose.choose(mesh(), choose.CODECS, 10_000_000, said.append) == chosen
    # 1.05 s at 2²⁰ numbers: long enough.
    assert [size for name, size in tried if name == "none"] == [1 << 14, 1 << 14, 1 << 16, 1 << 18, 1 << 20]
    assert all(size <= 1 << 22 for _, size in tried)
    (line,) = said
    assert line.startswith(f"codec {chosen}: an exchange between replicas would take none 10.0 s, int8 ")
    assert ("bf16" in line) == (chosen != "int8")


def test_no_more_than_there_is_to_send(monkeypatch):
    tried = network(monkeypatch, {"none": 1e-9, "Bf16": 1e-9, "Integers": 1e-9})
    assert choose.choose(mesh(), choose.CODECS, 100_000, lambda line: None) == "none"
    assert max(size for _, size in tried) == 1 << 18


@pytest.mark.parametrize(
    ("given", "reason"), [({"neighbours": 4}, "on this machine"), ({"layout": "fsdp=4"}, "one replica")]
)
def test_where_there_is_nothing_to_gain_nothing_is_tried(monkeypatch, given, reason):
    monkeypatch.delattr(choose, "_trial")
    said: list[str] = []
    assert choose.choose(mesh(**given), choose.CODECS, 1000, said.append) == "none"
    assert reason in said[0]


def test_all_ranks_choose_alike_by_what_they_measure(ranks):
    """On loopback, as if every rank were a machine of its own."""
    told = ranks.run("tests.sync.choose_cases:chosen", 3, numbers=100_000)
    assert told[0] == told[1] == told[2]
    codec, (line,) = told[0]
    assert line.startswith(f"codec {codec}: an exchange between replicas would take none ")
