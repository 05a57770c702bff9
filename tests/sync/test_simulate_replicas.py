"""Replicas simulated in one process: the same numbers as on ranks of their own, and times that can be told by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.sync.simulate.links import Links
from shoal.sync.simulate.ranks import Network, SimulatedMesh
from shoal.sync.simulate.turns import Turns
from shoal.training.parts import assemble
from tests.sync import local_cases

STEPS = 7
LOCAL = {"every": 3, "outer_lr": 0.7, "outer_momentum": 0.9}
STREAMING = {"every": 4, "fragments": 2, "delay": 2, "mix": 0.25, "outer_lr": 0.5, "outer_momentum": 0.6}
GOSSIP = {"name": "gossip", "every": 2}

CASES = [
    ("replicas=3,micro_batch=2", LOCAL, "even"),
    ("replicas=3,micro_batch=2", {**STREAMING, "codec": "int8"}, "even"),
    ("replicas=2,replica_share=2+1,micro_batch=2", {**LOCAL, "pace": "1+2", "together": 2}, "even"),
    pytest.param(
        "replicas=2,micro_batch=3",
        {**STREAMING, "codec": "topk:0.1", "feedback": False},
        "deepseek",
        marks=pytest.mark.nightly,
    ),
    pytest.param("replicas=3,micro_batch=4", GOSSIP, "even", marks=pytest.mark.nightly),
    ("replicas=4,micro_batch=3", GOSSIP, "even"),
    ("replicas=3,micro_batch=2", {"name": "allreduce", "codec": "int8"}, "even"),
    pytest.param(
        "replicas=2,micro_batch=2", {"name": "allreduce", "codec": "powersgd:2"}, "qwen", marks=pytest.mark.nightly
    ),
]


def simulated(layout: str, sync: dict[str, Any], links: Links | None = None, **options: Any) -> list[dict[str, Any]]:
    what = local_cases.job(layout, STEPS, sync, **options)
    assert what.layout is not None
    turns: Turns[dict[str, Any]] = Turns(what.layout.replicas)
    network = Network(turns, links or Links(what.layout.replicas))

    def program(rank: int) -> dict[str, Any]:
        assert what.layout is not None
        return local_cases.take_steps(assemble(what, SimulatedMesh(what.layout, rank, network)), STEPS)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return turns.run(program)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("layout", "sync", "model"), CASES)
def test_replicas_simulated_are_those_of_ranks_to_the_last_bit(ranks, layout, sync, model):
    """After every step, in float32: what all have in common, what each has of its own, and what each tells."""
    options = {"optimizer": "adamw", "tied": False, "model": model, "precision": "fp32"}
    found = simulated(layout, sync, **options)
    real = ranks.run("tests.sync.local_cases:train", len(found), layout=layout, steps=STEPS, sync=sync, **options)
    for ours, right in zip(found, real, strict=True):
        for what in ("losses", "norms", "tokens"):
            assert ours[what] == pytest.approx(right[what], rel=0, abs=0, nan_ok=True), what
        for what in ("common", "own"):
            for step in range(STEPS):
                weights = {name: values for name, _, values in ours[what][step]}
                assert weights == {name: values for name, _, values in right[what][step]}, (what, step + 1)
    assert found[0]["own"][0] != found[0]["own"][-1]


def test_a_line_carries_one_message_after_the_other_each_way():
    links = Links(3, rate=16000.0, delay=0.5)  # 2,000 bytes take a second
    assert links.message(0, 1, 2000, 0.0) == 1.5
    assert links.message(0, 2, 2000, 0.0) == 2.5, "the first one leaves first"
    assert links.message(2, 1, 2000, 0.0) == 2.5, "the first one comes in first"
    assert links.message(1, 0, 2000, 0.0) == 1.5, "the other way is free"
    assert links.message(0, 1, 1000, 0.0) == 1.0, "a packet goes between others"
    assert links.message(0, 1, 2000, 9.0) == 10.5
    assert links.sent == [7000, 2000, 2000]
    assert Links(2, delay=0.5).message(0, 1, 10**9, 1.0) == 1.5


@pytest.mark.parametrize(
    ("kind", "ends", "sent"),
    [
        # Of 6,000 bytes each of three ranks, where 2,000 take a second and 0.5 more; the last one begins at 1.
        ("sum", 1 + 4 * 1.5, 8000),
        ("all_gather", 1 + 2 * 3.5, 12000),
        ("all_to_all", 1 + 2 * 1 + 0.5, 4000),
    ],
)
def test_what_an_operation_of_all_takes(kind, ends, sent):
    turns: Turns[Any] = Turns(3)
    network = Network(turns, links := Links(3, rate=16000.0, delay=0.5))
    mine = {rank: (torch.arange(6000) % 80 + rank).to(torch.uint8).view(3, 2000) for rank in range(3)}
    out = {rank: torch.empty(9 if kind == "all_gather" else 3, 2000, dtype=torch.uint8) for rank in range(3)}

    def program(rank: int) -> float:
        turns.compute(rank, 1.0 if rank == 2 else 0.0)
        network.begin(rank, (0, 1, 2), kind, mine[rank], out[rank]).wait()
        return turns.now[rank]

    assert max(turns.run(program)) == pytest.approx(ends)
    assert links.sent == [sent] * 3
    for rank in range(3):
        rows = {"sum": sum(mine.values()), "all_gather": torch.cat([*mine.values()])}.get(kind)
        assert torch.equal(out[rank], torch.stack([m[rank] for m in mine.values()]) if rows is None else rows)


def test_what_travels_while_a_rank_computes_is_not_waited_for():
    for seconds, waited in ((10.0, 0.0), (1.0, 4.0)):
        turns: Turns[None] = Turns(2)
        network = Network(turns, Links(2, rate=8000.0))

        def program(rank: int, seconds: float = seconds, turns: Any = turns, network: Any = network) -> None:
            work = network.begin(rank, (0, 1), "swap", torch.zeros(5000, dtype=torch.uint8), torch.zeros(5000))
            turns.compute(rank, seconds)
            work.wait()

        turns.run(program)
        assert turns.waited == [waited] * 2
        assert turns.now == [seconds + waited] * 2


def test_whoever_is_furthest_behind_goes_on():
    turns: Turns[None] = Turns(3)
    seen: list[tuple[int, int]] = []

    def program(rank: int) -> None:
        for step in range(3):
            seen.append((rank, step))
            turns.compute(rank, [1.0, 2.5, 0.5][rank])

    turns.run(program)
    assert seen == [(0, 0), (1, 0), (2, 0), (2, 1), (0, 1), (2, 2), (0, 2), (1, 1), (1, 2)]


def test_what_one_raises_ends_all():
    turns: Turns[None] = Turns(3)
    network = Network(turns, Links(3))

    def program(rank: int) -> None:
        if rank == 1:
            raise ValueError("rank 1")
        network.begin(rank, (0, 1, 2), "sum", torch.ones(2), torch.ones(2)).wait()
        raise AssertionError("went on")

    with pytest.raises(ValueError, match="rank 1"):
        turns.run(program)


def test_ranks_that_wait_for_ever_are_found():
    turns: Turns[None] = Turns(3)
    network = Network(turns, Links(3))

    def program(rank: int) -> None:
        if rank:
            network.begin(rank, (0, 1, 2), "sum", torch.ones(2), torch.ones(2)).wait()

    with pytest.raises(AssertionError, match="ranks 1, 2 wait"):
        turns.run(program)
