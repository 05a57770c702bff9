"""One answer where tensor ranks multiply parts of the sequence while others go round their ring."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest

from shoal.mesh import Seat
from shoal.parallel import overlap
from tests.equivalence import cases

LAYOUTS = [
    ("even", "tensor=2,tensor_by=ring,micro_batch=6,recompute=block"),
    ("even", "tensor=4,tensor_by=ring,micro_batch=6"),
    ("borders", "fsdp=2,tensor=2,tensor_by=ring,micro_batch=3"),
    # Backward of inputs and of weights apart.
    ("even", "pipeline=2,tensor=2,tensor_by=ring,micro_batch=3,schedule=zbv"),
    ("deepseek", "tensor=2,tensor_by=ring,micro_batch=6"),
]


@pytest.mark.parametrize("row", [cases.Row(layout, model) for model, layout in LAYOUTS], ids=str)
def test_the_ring_computes_what_one_process_computes(ranks, row):
    cases.check(ranks, row)


def run(seat: Seat, bug: str, **options: Any) -> dict[str, Any]:
    """With a bug, only while it lasts: the ranks' processes are used again."""
    gather, scatter = overlap._gather, overlap._scatter

    def misplaced(x, group, use):
        return gather(x, group, lambda rank, part: use((rank + 1) % group.size(), part))

    def skipped(make, group):
        return scatter(lambda rank: make(rank) * (rank != (group.rank() + 1) % group.size()), group)

    wrong = {
        "a part multiplied into the wrong place": ("_gather", misplaced),
        "a sum that leaves out a rank": ("_scatter", skipped),
        "": ("_gather", gather),
    }[bug]
    with mock.patch.object(overlap, *wrong):
        return cases.run(seat, **options)


@pytest.mark.parametrize("bug", ["a part multiplied into the wrong place", "a sum that leaves out a rank"])
def test_planted_bugs_exceed_the_bound_a_hundred_times(ranks, bug):
    options = cases.Row("tensor=4,tensor_by=ring", steps=2).options | {"clip": 0.0}
    layout = options.pop("layout")
    expected = cases.reference(**options)

    def times(bug: str) -> float:
        results = ranks.run("tests.equivalence.test_overlap:run", 4, bug=bug, layout=layout, **options)
        return cases.times_the_bound(results, expected)

    assert times("") <= 1
    found = times(bug)
    print(f"{bug}: {found:.1e} times the bound")
    assert found > 100
