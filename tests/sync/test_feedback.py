"""Error feedback against one process that keeps residuals by itself, and against what it promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.job import Layout
from tests.equivalence import cases
from tests.sync import feedback_cases

STEPS = 10
OPTIONS = {"steps": STEPS, "optimizer": "sgd", "tied": False, "model": "even"}
CASES = "tests.sync.feedback_cases"

LAYOUTS = [
    "replicas=3,micro_batch=2", "replicas=2,fsdp=2,zero=3,micro_batch=1", "replicas=2,pipeline=2,micro_batch=2",
    pytest.param("replicas=2,fsdp=2,zero=1,micro_batch=3", marks=pytest.mark.nightly),
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_that_of_one_process_which_adds_what_was_lost(ranks, layout):
    """Through a codec that loses up to three quarters of each number, on both hops."""
    shape = Layout.parse(layout)
    results = ranks.run(f"{CASES}:train", shape.world, layout=layout, **OPTIONS)
    expected = cases.reference(replicas=shape.replicas, codec="coarse", feedback=True, **OPTIONS)
    cases.assert_one_answer(results, expected)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("replicas=2,fsdp=2,zero=1,micro_batch=1", "odd"),
        ("replicas=2,fsdp=2,zero=3,micro_batch=1", "odd"),
        ("replicas=2,fsdp=2,expert=2,micro_batch=3", "few experts"),
        ("replicas=2,context=2,zero=3,micro_batch=3", "deepseek"),
        ("replicas=2,tensor=2,micro_batch=2", "qwen"),
        ("replicas=2,pipeline=2,schedule=zbv,micro_batch=2", "even"),
    ],
)
def test_flat_tensors_say_where_each_parameter_lies_in_them(ranks, layout, model):
    """By addresses in memory: what `fully_shard` hands over nobody but PyTorch lays out."""
    for wrong in ranks.run(f"{CASES}:misplaced", 4, layout=layout, model=model):
        assert not wrong


SIZES, ROUNDS, REJECTED, WORLD = [1, 7, 1000], 6, [2, 5], 3


@pytest.fixture(scope="module")
def summed(ranks):
    return ranks.run(f"{CASES}:sums", WORLD, sizes=SIZES, steps=ROUNDS, rejected=REJECTED)


def test_sums_and_residuals_are_those_of_numpy_and_rejected_steps_leave_none(summed):
    """Every rank's rounding of each chunk and the owner's of the sum, by a codec to which padding matters."""
    for index, size in enumerate(SIZES):
        chunk = -(-size // WORLD)
        own, lost = np.zeros((WORLD, WORLD * chunk)), np.zeros(WORLD * chunk)
        inside = np.arange(WORLD * chunk) < size
        for step in range(ROUNDS):
            sent = own.copy()
            for rank in range(WORLD):
                sent[rank, :size] += feedback_cases.given(rank, step, size).numpy()
            signs = _signs(sent.reshape(WORLD, WORLD, chunk)).reshape(WORLD, -1)
            total = signs.sum(0) + lost
            arrived = _signs(total.reshape(WORLD, chunk)).reshape(-1)
            for result in summed:
                assert result["arrived"][step][index] == pytest.approx(list(arrived[:size]), abs=1e-12)
            if step not in REJECTED:
                own, lost = (sent - signs) * inside, (total - arrived) * inside
        for rank, result in enumerate(summed):
            assert result["own"][index] == pytest.approx(list(own[rank, :size]), abs=1e-12)
            first, numbers = result["sums"][index]
            assert result["encoded"] == 2 * ROUNDS * len(SIZES)
            assert first == rank * chunk
            assert numbers == pytest.approx(list(lost[first : min(first + chunk, size)]), abs=1e-12)


def _signs(rows: np.ndarray) -> np.ndarray:
    """What arrives, along the last dimension."""
    return np.where(rows < 0, -1.0, 1.0) * np.abs(rows).mean(-1, keepdims=True)


def test_what_arrived_and_what_is_kept_are_all_that_was_given(summed):
    """Nothing is lost for good, up to rounding; steps that were not applied count for nothing."""
    steps = [step for step in range(ROUNDS) if step not in REJECTED]
    for index, size in enumerate(SIZES):
        everything = sum(feedback_cases.given(rank, step, size) for rank in range(WORLD) for step in steps)
        there = sum(torch.tensor(summed[0]["arrived"][step][index], dtype=torch.float64) for step in steps)
        for result in summed:
            there += torch.tensor(result["own"][index], dtype=torch.float64)
            first, numbers = result["sums"][index]
            there[first : first + len(numbers)] += torch.tensor(numbers, dtype=torch.float64)
        torch.testing.assert_close(there, everything, rtol=0, atol=1e-12)


def test_signs_find_the_minimum_with_feedback_and_miss_it_without(ranks):
    """Three replicas whose own minima lie apart: at the common one their gradients cancel, but not their signs."""
    with_it, without = (ranks.run(f"{CASES}:descend", 3, steps=250, feedback=how) for how in (True, False))
    assert max(with_it) < 0.05
    assert min(without) > 0.5


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_applied_leaves_residuals_as_they_were(ranks, what):
    """Nothing that is not finite stays in them, and training goes on as if the step had not been."""
    layout = "replicas=3,micro_batch=2"
    results = ranks.run(f"{CASES}:disturbed", 3, layout=layout, what=what, at=2)
    without = ranks.run(f"{CASES}:disturbed", 3, layout=layout, what="left out", at=2)
    for one, other in zip(results, without, strict=True):
        before, after = one["around"]
        assert before == after != []
        assert one["weights"] == other["weights"]
