"""One answer: every way to spread a replica over ranks, and every pair of ways, computes what one process computes."""

from __future__ import annotations

import functools
from itertools import combinations

import pytest

from tests.equivalence import bugs, cases

# Nightly; else `Row`'s own number.
STEPS = 20
SCHEDULES = ("gpipe", "1f1b", "interleaved", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")

SINGLES = [
    *(f"pipeline=2,micro_batch=3,schedule={schedule}" for schedule in SCHEDULES),
    "pipeline=4,micro_batch=3",
    "pipeline=2,micro_batch=3,stages=3+1",
    "pipeline=2,micro_batch=3,recompute=block",
    "tensor=2,micro_batch=6",
    "tensor=2,micro_batch=4,recompute=block",
    "tensor=4,micro_batch=6",  # key heads on two ranks each
    "context=2,micro_batch=6",
    "context=2,micro_batch=4,zero=1,recompute=block",
    "context=3,micro_batch=6,zero=2",
    "context=4,micro_batch=6",
    "context=2,micro_batch=6,context_by=ulysses",
    "context=4,micro_batch=6,context_by=ulysses",
]

AXES = ("replicas=2", "pipeline=2", "fsdp=2", "context=2", "tensor=2")
PAIRS = [
    *(cases.accumulated(f"{one},{other}") for one, other in combinations(AXES, 2)),
    # What meets differently: whole stages gathered, stages apart, a V with both ends on one rank, heads exchanged.
    "replicas=2,pipeline=2,micro_batch=2,schedule=zbv",
    "pipeline=2,fsdp=2,micro_batch=2,schedule=interleaved",
    "pipeline=2,fsdp=2,micro_batch=1,schedule=dualpipev,zero=1",
    "pipeline=2,tensor=2,micro_batch=4,schedule=interleaved_zero_bubble",
    "pipeline=2,tensor=2,micro_batch=4,schedule=zbv",
    "pipeline=2,context=2,micro_batch=4,schedule=looped_bfs,context_by=ulysses",
    "fsdp=2,tensor=2,zero=1,micro_batch=2",
    "fsdp=2,context=2,zero=2,micro_batch=2",
    "context=2,tensor=2,micro_batch=6,context_by=ulysses",
]
TRIPLES = [
    *(cases.accumulated(",".join(three)) for three in combinations(AXES, 3)),
    "replicas=2,pipeline=2,fsdp=2,micro_batch=1,schedule=zbv",
    "pipeline=2,fsdp=2,tensor=2,micro_batch=1,schedule=interleaved_zero_bubble",
    "pipeline=4,tensor=2,micro_batch=1",
    "pipeline=2,tensor=4,micro_batch=2,schedule=dualpipev",
    "context=4,tensor=2,micro_batch=2",
    "replicas=2,tensor=4,micro_batch=3",
]
# An output layer of its own, and state that is cut: AdamW hides a gradient of the wrong size, which SGD shows.
ADAM = ["pipeline=2,tensor=2,micro_batch=4", "tensor=4,micro_batch=4", "context=2,tensor=2,micro_batch=6"]
# Within a rank's rows, where q, k, v, or gate and up, are stored as one, biases too.
BORDERS = ["fsdp=2,tensor=2,micro_batch=3,zero=2", "fsdp=3,micro_batch=2", "replicas=2,tensor=2,micro_batch=3"]
DROPOUT = [
    "replicas=2,micro_batch=3",
    "pipeline=2,micro_batch=3,schedule=zbv",
    "tensor=2,micro_batch=6,recompute=block",
    "context=2,micro_batch=6,context_by=ulysses",
    "context=2,tensor=2,micro_batch=6",
]

# Replicas with unequal parts, and so with other numbers of micro-batches, each also beside another axis.
UNEVEN = [
    "replicas=2,replica_share=3+1,micro_batch=3",
    "replicas=3,replica_share=1+3+2,micro_batch=2",
    "replicas=4,replica_share=1+5+4+2,micro_batch=1",
    *(f"replicas=2,replica_share=2+1,fsdp=2,zero={zero},micro_batch=2" for zero in (1, 2, 3)),
    "replicas=2,replica_share=1+2,pipeline=2,micro_batch=2",
    "replicas=2,replica_share=2+1,pipeline=2,micro_batch=2,schedule=zbv",
    "replicas=2,replica_share=2+1,pipeline=2,micro_batch=2,schedule=interleaved",
    "replicas=2,replica_share=3+1,context=2,micro_batch=3",
    "replicas=2,replica_share=3+1,tensor=2,micro_batch=3",
]


@pytest.mark.parametrize("row", [cases.Row(layout) for layout in SINGLES], ids=str)
def test_singles(ranks, row):
    cases.check(ranks, row)


@pytest.mark.parametrize(
    "row",
    [
        *map(cases.Row, UNEVEN),
        cases.Row(UNEVEN[0], dropout=0.2),
        cases.Row(UNEVEN[1], optimizer="adamw"),
        cases.Row("replicas=2,replica_share=2+1,fsdp=2,expert=2,micro_batch=2", "deepseek"),
    ],
    ids=str,
)
def test_uneven_replicas(ranks, row):
    cases.check(ranks, row)


@pytest.mark.parametrize("row", [cases.Row(layout) for layout in PAIRS], ids=str)
def test_pairs(ranks, row):
    cases.check(ranks, row)


@pytest.mark.nightly
@pytest.mark.parametrize("row", [cases.Row(layout, steps=STEPS) for layout in [*SINGLES, *PAIRS, *TRIPLES]], ids=str)
def test_over_all_steps(ranks, row):
    cases.check(ranks, row)


@pytest.mark.parametrize("row", [cases.Row(layout, optimizer="adamw") for layout in ADAM], ids=str)
def test_adam_with_an_output_layer_of_its_own(ranks, row):
    cases.check(ranks, row)


@pytest.mark.parametrize("row", [cases.Row(layout, "borders") for layout in BORDERS], ids=str)
def test_borders_within_a_ranks_rows(ranks, row):
    cases.check(ranks, row)


@pytest.mark.parametrize("row", [cases.Row(layout, dropout=0.2) for layout in DROPOUT], ids=str)
def test_dropout(ranks, row):
    cases.check(ranks, row)


# Each with a layout in which it can happen.
PLANTED = {
    "micro-batches averaged": "pipeline=2,micro_batch=2",
    "times the tensor degree": "tensor=2",
    "norm weight not summed": "tensor=2",
    "key heads not summed": "tensor=4",
    "keys taken for values": "tensor=2",
    "rows of a fused gradient off by one": "fsdp=4",
    "key heads counted twice": "tensor=4",
    "tied gradient added twice": "pipeline=2,micro_batch=3",
    "tied gradient counted twice": "pipeline=2,micro_batch=3,schedule=zbv",
    "ring off by one chunk": "context=3,micro_batch=6",
    "labels shifted on each rank": "context=2",
    "positions of a whole row": "context=2",
    "words not combined": "tensor=2",
    "dropout by rank": "fsdp=2",
    "dropout by local positions": "tensor=2",
    "sequence gathered in another order": "tensor=2",
}


@functools.cache
def times_the_bound(ranks, layout: str, bug: str, dropout: float) -> float:
    """The worst of the first gradient (bound 1e-10) and of two steps' losses and norms (1e-8)."""
    row = cases.Row(layout, steps=2, dropout=dropout)
    return cases.times_the_bound(bugs.results(ranks, bug, row), bugs.reference(row))


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_exceed_the_bound_a_hundred_times(ranks, bug):
    layout, dropout = PLANTED[bug], 0.2 if "dropout" in bug else 0.0
    assert times_the_bound(ranks, layout, "", dropout) <= 1
    times = times_the_bound(ranks, layout, bug, dropout)
    print(f"{layout}, {bug}: {times:.1e} times the bound")
    assert times > 100
