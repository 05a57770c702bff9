"""What a pipeline's ranks compute, in which order, and how long that would take at best."""

from __future__ import annotations

import pytest
from benchmarks.bubble import Action, Order, formula, orders_of_one_stage, parts, simulate
from hypothesis import given
from hypothesis import strategies as st

from shoal.job.layout import SCHEDULES

RANKS, MICRO_BATCHES = 4, 8


def seconds(_: Action) -> float:
    return 1.0


@given(st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 6), st.integers(0, 6))
def test_the_simulator_finds_the_formula(schedule: str, ranks: int, more: int) -> None:
    micro_batches = ranks + more
    orders = orders_of_one_stage(schedule, micro_batches, ranks)
    # (m + p - 1)(f + b), Narayanan et al. 2021, section 2.2.
    assert simulate(orders, seconds) == 3 * (micro_batches + ranks - 1)


@given(st.integers(1, 6), st.integers(1, 8), st.floats(0, 2))
def test_messages_of_gpipe_are_waited_for_on_the_way_there_and_back(ranks: int, micro_batches: int, message: float):
    orders = orders_of_one_stage("gpipe", micro_batches, ranks)
    expected = 3 * (micro_batches + ranks - 1) + 2 * (ranks - 1) * message
    assert simulate(orders, seconds, message) == pytest.approx(expected)


@given(st.integers(2, 6), st.floats(0, 2))
def test_messages_of_1f1b_are_waited_for_in_every_round(ranks: int, message: float):
    """The first rank has `ranks` micro-batches under way: a round of them goes to the last rank and back."""
    rounds = 10
    one, all_ = (orders_of_one_stage("1f1b", n * ranks, ranks) for n in (5, 5 + rounds))
    more = simulate(all_, seconds, message) - simulate(one, seconds, message)
    assert more == pytest.approx(rounds * (3 * ranks + 2 * (ranks - 1) * message))


def test_the_simulator_sees_a_worse_order_and_a_deadlock() -> None:
    one_by_one: list[Order] = [[[(r, what, m)] for m in range(MICRO_BATCHES) for what in "FB"] for r in range(RANKS)]
    assert simulate(one_by_one, seconds) == 3 * RANKS * MICRO_BATCHES
    orders = orders_of_one_stage("1f1b", MICRO_BATCHES, RANKS)
    last: Order = [orders[-1][1], orders[-1][0], *orders[-1][2:]]
    with pytest.raises(AssertionError, match="wait for each other"):
        simulate([*orders[:-1], last], seconds)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_compute_in_the_order_of_the_schedule(ranks, schedule: str) -> None:
    found = ranks.run(
        "benchmarks.bubble:rank_main", RANKS, schedule=schedule, micro_batches=MICRO_BATCHES, seconds=0.0, kib=1,
        repetitions=2,
    )  # fmt: skip
    orders: list[Order] = [[[tuple(action) for action in turn] for turn in order] for order in found[0]["orders"]]
    for rank, order in enumerate(orders):
        expected = [set(parts(action)) for turn in order for action in turn if parts(action)]
        for log in found[rank]["logs"]:
            # Autograd may take the two gradients of a full backward in either order.
            done = iter(tuple(action) for action, _ in log)
            assert [{next(done) for _ in together} for together in expected] == expected
            assert next(done, None) is None
    stages = RANKS * SCHEDULES[schedule]
    leaves = {part for order in orders for turn in order for action in turn for part in parts(action)}
    assert leaves == {(s, what, m) for s in range(stages) for what in "FIW" for m in range(MICRO_BATCHES)}
    bubble = 1 - 3 * SCHEDULES[schedule] * MICRO_BATCHES / simulate(orders, seconds)
    if (expected_bubble := formula(schedule, MICRO_BATCHES)) is not None:
        assert bubble == pytest.approx(expected_bubble)
    else:
        # The gradients of weights fill what an interleaved schedule leaves idle.
        assert 0 < bubble < 3 / (2 * MICRO_BATCHES + 3)


def test_1f1b_holds_fewer_micro_batches_than_gpipe() -> None:
    def most_held(order: Order) -> int:
        held = most = 0
        for turn in order:
            for _, what, _ in turn:
                held += 1 if what == "F" else -1
                most = max(most, held)
        return most

    assert [most_held(o) for o in orders_of_one_stage("gpipe", MICRO_BATCHES)] == [8, 8, 8, 8]
    assert [most_held(o) for o in orders_of_one_stage("1f1b", MICRO_BATCHES)] == [4, 3, 2, 1]
