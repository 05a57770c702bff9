"""PowerSGD: three replicas against the paper's algorithms by hand, and against what they promise."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from tests.sync import lowrank_cases
from tests.sync.lowrank_cases import MATRICES, SHAPES

CASES, WORLD = "tests.sync.lowrank_cases", 3
STEPS, BROKEN = 6, 3


def run(ranks, kind: str, steps: int, **options):
    return ranks.run(f"{CASES}:run", WORLD, kind=kind, steps=steps, **options)


def apart(got, expected) -> float:
    """Of the norm of what is expected."""
    return float(np.linalg.norm(np.array(got) - expected) / np.linalg.norm(expected))


def worst(results, broken: int = -1) -> float:
    """How far what arrived, and residuals, are from those by hand, relative to the norm of each."""
    arrived, lost = lowrank_cases.by_hand(WORLD, STEPS, results[0]["first"], broken)
    found = [apart(results[0]["arrived"][i][n], one) for i, sums in enumerate(arrived) for n, one in sums.items()]
    found += [apart(r["residuals"][n], lost[rank][n]) for rank, r in enumerate(results) for n in MATRICES]
    return max(found)


@pytest.fixture(scope="module")
def told(ranks):
    """Six steps, of which the fourth has a number that is not finite, and is not applied."""
    return run(ranks, "full", STEPS, broken=BROKEN)


def test_what_arrives_and_what_is_lost_is_that_of_the_paper(told):
    """In float64; and a step that is not applied leaves directions and residuals as they were."""
    assert worst(told, BROKEN) < 1e-11


@pytest.mark.parametrize("rank", [1, 3])
def test_replicas_are_equal_to_the_last_bit(ranks, rank):
    one, *others = run(ranks, "full", 3, dtype="float32", rank=rank)
    for other in others:
        for what in ("first", "arrived", "last"):
            assert one[what] == other[what]
        assert one["residuals"] != other["residuals"]


def test_a_number_that_is_not_finite_is_seen_on_all_replicas(told):
    for result in told:
        broken = result["arrived"][BROKEN]
        assert np.isnan(broken["wide"]).all()
        assert np.isfinite(broken["norm"]).all()
        assert all(np.isfinite(numbers).all() for numbers in (*result["last"].values(), *result["residuals"].values()))


def test_what_arrived_and_what_is_kept_are_all_that_was_given(told):
    steps = [step for step in range(STEPS) if step != BROKEN]
    for name in SHAPES:
        everything = sum(lowrank_cases.given(rank, step, "full")[name] for rank in range(WORLD) for step in steps)
        there = [told[0]["arrived"][step][name] for step in steps] + [result["residuals"][name] for result in told]
        total = sum(torch.tensor(numbers, dtype=torch.float64) for numbers in there)
        torch.testing.assert_close(total, everything, rtol=0, atol=1e-11)


@pytest.mark.parametrize("bug", ["cold", "unsummed", "lost"])
def test_a_bug_would_be_seen(ranks, bug):
    """The directions of the first step in all of them; right factors that are not summed; residuals that are not."""
    assert worst(run(ranks, "full", STEPS, bug=bug)) > 0.01


@pytest.mark.parametrize("feedback", [True, False])
def test_a_sum_of_that_rank_arrives_whole(ranks, feedback):
    """Another one each step. Nothing is lost, though no replica's own gradient arrives."""
    results = run(ranks, "low", 4, feedback=feedback)
    for step, arrived in enumerate(results[0]["arrived"]):
        for name in SHAPES:
            expected = sum(lowrank_cases.given(rank, step, "low")[name] for rank in range(WORLD)).numpy()
            assert apart(arrived[name], expected) < 1e-10, (step, name)
    assert {*results[0]["residuals"]} == ({*SHAPES} if feedback else set())


def test_after_a_step_without_gradients_it_goes_on(ranks):
    """In the direction of nothing, nothing would be found again where the first rows are zero."""
    expected = sum(lowrank_cases.given(rank, 2, "gone")["wide"] for rank in range(WORLD)).numpy()
    for bug in ("", "stuck"):
        _, none, again = run(ranks, "gone", 3, feedback=False, bug=bug)[0]["arrived"]
        assert not any(np.array(numbers).any() for numbers in none.values())
        assert (apart(again["wide"], expected) < 1e-10) == (not bug)


def test_of_what_stays_the_same_the_best_of_that_rank_arrives(ranks):
    """Each step goes on where the one before ended: a power iteration (section 3 of the paper, and Eckart & Young)."""
    lost = {}
    for bug in ("", "cold"):
        arrived = run(ranks, "same", 40, feedback=False, bug=bug)[0]["arrived"]
        total = sum(lowrank_cases.given(rank, 0, "same")["wide"] for rank in range(WORLD)).numpy()
        least = np.sqrt((np.linalg.svd(total, compute_uv=False)[3:] ** 2).sum()) / np.linalg.norm(total)
        lost[bug] = [apart(one["wide"], total) / least for one in arrived]
    assert lost[""][0] > 1.05
    assert 1 <= lost[""][-1] < 1.001
    assert lost["cold"][-1] > 1.05


@pytest.mark.skipif(sys.platform != "linux", reason="only there sockets are counted")
def test_so_few_bytes_go_through_the_sockets(ranks):
    """An all-reduce of three ranks sends 4/3 of its bytes a rank: of 4 rows and 4 columns, and of the vector."""
    size = {"rank": 4, "rows": 2000, "columns": 1500, "vector": 11_000}
    numbers = 4 * (2000 + 1500) + 11_000
    for sent, received in ranks.run(f"{CASES}:bytes_of_a_sum", WORLD, **size):
        # Every message has some bytes more than its numbers.
        assert 4 / 3 * 4 * numbers <= received <= 1.04 * 4 / 3 * 4 * numbers
        assert 4 / 3 * 4 * numbers <= sent <= 1.04 * 4 / 3 * 4 * numbers
        assert sent < 0.01 * 4 / 3 * 4 * 2000 * 1500
