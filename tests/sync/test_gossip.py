"""Gossip: who meets whom, training against one process, and that nobody sums over all."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.job import Layout
from shoal.job.sync import SyncOptions
from shoal.sync.pairs import heard_by_all, partner
from tests.equivalence import cases
from tests.sync import gossip_cases

STEPS = 7
GOSSIP = {"name": "gossip", "every": 2, "outer_lr": 0.7, "outer_momentum": 0.5, "pull": 0.8}


@given(st.integers(0, 9), st.integers(0, 99), st.integers(1, 9))
def test_a_meeting_is_a_matching(seed, meeting, replicas):
    of = [partner(seed, meeting, replicas, r) for r in range(replicas)]
    assert all(p is None or (p != r and of[p] == r) for r, p in enumerate(of))
    assert of.count(None) == replicas % 2


def test_everybody_meets_everybody_equally_often():
    met = np.zeros((6, 6))
    for meeting in range(6000):
        for r in range(6):
            met[r, partner(3, meeting, 6, r)] += 1
    others = met[~np.eye(6, dtype=bool)]
    # A fifth of 6000, give or take five standard deviations.
    assert abs(others - 1200).max() < 5 * math.sqrt(6000 * 0.2 * 0.8)


@given(st.integers(0, 5), st.integers(0, 20), st.integers(1, 8))
def test_what_one_says_is_heard_by_all_when_it_is_said_to_be(seed, meeting, replicas):
    last = heard_by_all(seed, meeting, replicas, 0)
    for end in (last - 1, last):
        told = np.zeros(replicas, bool)
        told[0] = True
        for number in range(meeting, end + 1):
            before = told.copy()
            for r in range(replicas):
                p = partner(seed, number, replicas, r)
                told[r] |= p is not None and before[p]
        assert told.all() == (end == last or replicas == 1)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.7, 0.9])
def test_the_largest_pull_is_where_the_variance_of_random_pairs_stops_to_shrink(momentum):
    """Of many replicas without gradients, by simulation."""

    def grows(pull: float) -> bool:
        chance = np.random.default_rng(0)
        slow, speed = chance.normal(size=20_000), np.zeros(20_000)
        for _ in range(400):
            order = chance.permutation(20_000).reshape(-1, 2)
            other = np.empty(20_000)
            other[order[:, 0]], other[order[:, 1]] = slow[order[:, 1]], slow[order[:, 0]]
            speed = momentum * speed - pull * (slow - other) / 2
            slow = slow + speed
        return bool(slow.var() > 1)

    most = 2 * (1 - momentum**2)
    assert grows(1.05 * most)
    assert not grows(0.95 * most)
    options = SyncOptions(name="gossip", outer_momentum=momentum)
    assert options.pulled == pytest.approx(most / 2)


LAYOUTS = [
    ("replicas=3,micro_batch=2", "adamw"), ("replicas=4,micro_batch=3", "sgd"), ("replicas=1,micro_batch=6", "sgd"),
    ("replicas=2,fsdp=2,micro_batch=1", "sgd"), ("replicas=2,pipeline=2,micro_batch=2", "adamw"),
    ("replicas=2,tensor=2,micro_batch=2", "muon"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "optimizer"), LAYOUTS)
def test_training_is_that_of_one_process_with_a_model_for_each_replica(ranks, layout, optimizer):
    options = {"optimizer": optimizer, "tied": False, "model": "even"}
    results = ranks.run(
        "tests.sync.local_cases:train", Layout.parse(layout).world, layout=layout, steps=STEPS, sync=GOSSIP, **options
    )
    replicas = Layout.parse(layout).replicas
    expected = gossip_cases.reference(replicas, STEPS, 2, 0.7, 0.5, 0.8, **options)
    for result in results:
        for step in range(STEPS):
            for name, offsets, values in result["own"][step]:
                piece, like = torch.tensor(values, dtype=torch.float64), expected["own"][step][result["replica"]][name]
                if piece.numel():
                    assert cases.apart(piece, like[cases.place(offsets, piece)], like) < 1e-8, (step + 1, name)
    if replicas > 1:
        one, other = (expected["own"][2][r]["lm_head.weight"] for r in (0, 1))
        assert cases.apart(one, other, one) > 1e-3, "replicas that never differ prove nothing"


def test_a_pair_sends_two_models_and_who_is_left_over_nothing(ranks):
    sync = GOSSIP | {"every": 3}
    told = ranks.run("tests.sync.local_cases:bytes_of_steps", 3, sync=sync, codec="none", steps=6)
    for replica, (*steps, (numbers, _)) in enumerate(told):
        for step, (sent, received) in enumerate(steps[:5], 1):
            meets = step == 3 and partner(5, 0, 3, replica) is not None
            least = 2 * 4 * numbers if meets else 0
            assert least <= sent <= 1.05 * least + 3000, step
            assert least <= received <= 1.05 * least + 3000, step
