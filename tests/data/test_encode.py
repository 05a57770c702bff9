"""Work by threads: in order, bounded, and it ends at the first failure."""

from __future__ import annotations

import threading

import pytest

from shoal.data.encode import in_order


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_and_few_are_begun_ahead(workers):
    begun, most, taken = 0, 0, 0
    lock = threading.Lock()

    def work(item: int) -> int:
        nonlocal begun, most
        with lock:
            begun += 1
            most = max(most, begun - taken)
        return item * item

    for expected, result in enumerate(in_order(work, iter(range(100)), workers)):
        assert result == expected * expected
        with lock:
            taken += 1
    assert taken == 100
    assert most <= 2 * workers + 1


def test_items_are_not_drawn_ahead_of_need():
    drawn = 0

    def items():
        nonlocal drawn
        for item in range(1000):
            drawn += 1
            yield item

    results = in_order(str, items(), 2)
    next(results)
    assert drawn <= 4
    results.close()


def test_a_failure_is_raised_in_its_place():
    def work(item: int) -> int:
        if item == 7:
            raise ValueError("seven")
        return item

    results = in_order(work, range(100), 3)
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(ValueError, match="seven"):
        next(results)
