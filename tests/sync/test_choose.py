"""`codec = auto`: what is chosen from what was measured, and that all ranks choose alike."""

from __future__ import annotations

import types

import pytest
import torch

from shoal.job import Layout
from shoal.sync import choose
from shoal.sync.codec.blocks import Integers
from shoal.sync.codec.cast import Bf16


def mesh(layout: str = "replicas=4", neighbours: int = 1):
    seat = types.SimpleNamespace(neighbours=neighbours, world=4)
    return types.SimpleNamespace(layout=Layout.parse(layout), seat=seat, device=torch.device("cpu"), largest=float)


class Network:
    """Four hosts, simulated: each sends so many bits a second, but `burst` bytes at once. Time is what this says.

    factors: of bytes and of latency, by codec. coding: seconds a number for a codec.
    """

    def __init__(self, patch: pytest.MonkeyPatch, rate: float, factors: dict[str, float], **options: float):
        self.rate, self.factors = rate, {"none": 1.0} | factors
        self.latency, self.burst, self.coding = (options.get(n, 0.0) for n in ("latency", "burst", "coding"))
        self.now, self.level, self.since = 0.0, self.burst, 0.0
        self.tried: list[tuple[str, int]] = []
        patch.setattr(choose, "time", types.SimpleNamespace(perf_counter=lambda: self.now))
        patch.setattr(choose, "_sum", lambda mesh, flat_N: self.exchange("none", flat_N.numel()))
        patch.setattr(choose, "_encoded", lambda mesh, s, flat_N: self.exchange(NAMES[type(s.codec)], flat_N.numel()))

    def exchange(self, name: str, numbers: int) -> None:
        """As in a ring of four: 3/4 of all bytes are sent twice."""
        self.tried.append((name, numbers))
        sent = 1.5 * 4 * numbers * self.factors[name]
        # What was not sent meanwhile may be sent at once, up to the burst.
        self.level = min(self.burst, self.level + (self.now - self.since) * self.rate / 8)
        seconds = max(0.0, sent - self.level) * 8 / self.rate
        self.level = max(0.0, self.level - sent)
        self.now += seconds + 6 * self.latency + (self.coding * numbers if name != "none" else 0.0)
        self.since = self.now

    def largest(self, name: str) -> int:
        return max((size for tried, size in self.tried if tried == name), default=0)


NAMES: dict[type, str] = {Bf16: "bf16", Integers: "int8"}


@pytest.mark.parametrize(
    ("int8", "bf16", "chosen"),
    [(0.26, 0.5, "int8"), (0.69, 0.5, "int8"), (0.9, 0.6, "bf16"), (0.71, 0.71, "none"), (1.5, 1.2, "none")],
)
def test_the_first_that_saves_enough(monkeypatch, int8, bf16, chosen):
    network = Network(monkeypatch, 48e6, {"bf16": bf16, "int8": int8})
    said: list[str] = []
    assert choose.choose(mesh(), choose.CODECS, 10_000_000, said.append) == chosen
    sizes = [size for name, size in network.tried if name == "none"]
    # 0.262 s at 2¹⁸ numbers, of which half a second is planned for.
    assert sizes == [1 << 10, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18]
    (line,) = said
    assert line.startswith(f"codec {chosen}: an exchange between replicas would take none 10.0 s, int8 ")
    assert ("bf16" in line) == (chosen != "int8")


@pytest.mark.parametrize("latency", [0.0, 5e-3])
@pytest.mark.parametrize("burst", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("rate", [1e6, 3e6, 1e7, 1e8, 1e9, 1e10])
def test_all_trials_together_take_at_most_two_seconds(monkeypatch, rate, burst, latency):
    """At 1 Mbit/s to 10 Gbit/s, all three ways, also where a link takes the first bytes at once and is slow after: 256
    kB, but no more than it sends in 0.2 s."""
    burst = min(256e3, burst * rate / 8)
    for factors in ({"int8": 0.9, "bf16": 0.95}, {"int8": 0.258, "bf16": 0.5}):
        network = Network(monkeypatch, rate, factors, latency=latency, burst=burst, coding=2e-9)
        said: list[str] = []
        found = choose.choose(mesh(), choose.CODECS, 10_000_000, said.append)
        assert network.now <= 2.0, said
        # On the fastest, latency and coding are most of it.
        assert rate == 1e10 or found == ("none" if factors["int8"] == 0.9 else "int8"), said
        assert network.largest("none") > choose._FIRST
        if not burst and not latency:
            whole = 1.5 * 4 * 8 * 10_000_000 / rate
            assert f"none {choose._short(whole)}" in said[0]


def test_a_link_on_which_nothing_is_fast_is_tried_no_more_than_must_be(monkeypatch):
    """A satellite and a half: one exchange of anything takes 1.8 s."""
    network = Network(monkeypatch, 1e9, {"int8": 0.258, "bf16": 0.5}, latency=0.3)
    assert choose.choose(mesh(), choose.CODECS, 10_000_000, lambda line: None) == "none"
    assert network.tried == [("none", 1 << 10), ("int8", 1 << 10), ("bf16", 1 << 10)]


@pytest.mark.parametrize("numbers", [100_000, 300])
def test_no_more_than_there_is_to_send(monkeypatch, numbers):
    network = Network(monkeypatch, 1e9, {"int8": 1.0, "bf16": 1.0})
    assert choose.choose(mesh(), choose.CODECS, numbers, lambda line: None) == "none"
    assert {network.largest(name) for name in NAMES.values()} == {numbers}


@pytest.mark.parametrize(
    ("given", "reason"), [({"neighbours": 4}, "on this machine"), ({"layout": "fsdp=4"}, "one replica")]
)
def test_where_there_is_nothing_to_gain_nothing_is_tried(monkeypatch, given, reason):
    network = Network(monkeypatch, 1e9, {})
    said: list[str] = []
    assert choose.choose(mesh(**given), choose.CODECS, 1000, said.append) == "none"
    assert reason in said[0]
    assert not network.tried


def test_all_ranks_choose_alike_by_what_they_measure(ranks):
    """On loopback, as if every rank were a machine of its own."""
    told = ranks.run("tests.sync.choose_cases:chosen", 3, numbers=100_000)
    assert told[0] == told[1] == told[2]
    codec, (line,) = told[0]
    assert line.startswith(f"codec {codec}: an exchange between replicas would take none ")
