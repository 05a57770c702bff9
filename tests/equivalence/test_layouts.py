"""One answer: every way to spread a replica over ranks, and every pair of ways, computes what one process computes."""

from __future__ import annotations

import functools
from itertools import combinations

import pytest

from tests.equivalence import cases

STEPS = 20
# Of what is there by default of pairs, so that all of them are; nightly they have all steps.
FEWER = 6
SCHEDULES = ("gpipe", "1f1b", "interleaved", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev")

SINGLES = [
    *(f"pipeline=2,micro_batch=2,schedule={schedule}" for schedule in SCHEDULES),
    "pipeline=4,micro_batch=3",
    "pipeline=2,micro_batch=3,stages=3+1",
    "pipeline=2,micro_batch=3,recompute=block",
    "tensor=2",
    "tensor=2,micro_batch=6,recompute=block",
    "tensor=4",  # key heads on two ranks each
    "context=2",
    "context=2,zero=1,micro_batch=6,recompute=block",
    "context=3,zero=2,micro_batch=6",
    "context=4",
    "context=2,context_by=ulysses",
    "context=4,context_by=ulysses",
]

AXES = {
    "replicas": "replicas=2",
    "pipeline": "pipeline=2,micro_batch=2",
    "fsdp": "fsdp=2",
    "context": "context=2",
    "tensor": "tensor=2",
}
PAIRS = [
    *(f"{AXES[one]},{AXES[other]}" for one, other in combinations(AXES, 2)),
    # What meets differently: whole stages gathered, stages apart, a V with both ends on one rank, heads exchanged.
    "replicas=2,pipeline=2,micro_batch=2,schedule=zbv",
    "pipeline=2,fsdp=2,micro_batch=1,schedule=interleaved",
    "pipeline=2,fsdp=2,micro_batch=1,schedule=dualpipev,zero=1",
    "pipeline=2,tensor=2,micro_batch=3,schedule=interleaved_zero_bubble",
    "pipeline=2,tensor=2,micro_batch=3,schedule=zbv",
    "pipeline=2,context=2,micro_batch=3,schedule=looped_bfs,context_by=ulysses",
    "fsdp=2,tensor=2,zero=1,micro_batch=2",
    "fsdp=2,context=2,zero=2,micro_batch=2",
    "context=2,tensor=2,context_by=ulysses",
]
TRIPLES = [
    *(",".join(AXES[axis] for axis in three) for three in combinations(AXES, 3)),
    "replicas=2,pipeline=2,fsdp=2,micro_batch=1,schedule=zbv",
    "pipeline=2,fsdp=2,tensor=2,micro_batch=1,schedule=interleaved_zero_bubble",
    "pipeline=4,tensor=2,micro_batch=1",
    "pipeline=2,tensor=4,micro_batch=2,schedule=dualpipev",
    "context=4,tensor=2,micro_batch=2",
    "replicas=2,tensor=4",
]


@functools.cache
def reference(optimizer: str, tied: bool, steps: int = STEPS, clip: float = 0.5, dropout: float = 0.0):
    return cases.reference(steps, optimizer=optimizer, tied=tied, model="even", clip=clip, dropout=dropout)


def world(layout: str) -> int:
    return cases.Layout.parse(layout).world


def check(ranks, layout: str, optimizer: str, tied: bool, dropout: float = 0.0, steps: int = STEPS) -> None:
    """The bounds of the design: gradients 1e-10, all else 1e-8."""
    expected = reference(optimizer, tied, steps, dropout=dropout)
    results = ranks.run(
        "tests.equivalence.cases:run", world(layout), layout=layout, steps=steps, optimizer=optimizer, tied=tied,
        model="even", dropout=dropout,
    )  # fmt: skip
    cases.assert_one_answer(results, expected)


# SGD shows a gradient of the wrong size, which AdamW hides; AdamW goes where state is cut or the ends are not tied.
@pytest.mark.parametrize("layout", SINGLES)
def test_singles(ranks, layout):
    check(ranks, layout, "sgd", tied=True)


@pytest.mark.parametrize("layout", PAIRS)
def test_pairs(ranks, layout):
    check(ranks, layout, "sgd", tied=True, steps=FEWER)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", PAIRS)
def test_pairs_over_all_steps(ranks, layout):
    check(ranks, layout, "sgd", tied=True)


@pytest.mark.parametrize(
    "layout",
    ["pipeline=2,tensor=2,micro_batch=4", "tensor=4", "context=2,tensor=2", "pipeline=4,micro_batch=3"],
)
def test_adam_with_an_output_layer_of_its_own(ranks, layout):
    check(ranks, layout, "adamw", tied=False, steps=FEWER)


@pytest.mark.parametrize(
    "layout",
    [
        "replicas=2,micro_batch=3",
        "pipeline=2,micro_batch=2,schedule=zbv",
        "tensor=2,micro_batch=6,recompute=block",
        "context=2,tensor=2",
    ],
)
def test_dropout(ranks, layout):
    check(ranks, layout, "sgd", tied=True, dropout=0.2, steps=FEWER)


@pytest.mark.nightly
@pytest.mark.parametrize("layout", TRIPLES)
def test_triples(ranks, layout):
    check(ranks, layout, "sgd", tied=True)


# Each with a layout in which it can happen.
PLANTED = {
    "micro-batches averaged": "pipeline=2,micro_batch=2",
    "times the tensor degree": "tensor=2",
    "norm weight not summed": "tensor=2",
    "key heads not summed": "tensor=4",
    "key heads counted twice": "tensor=4",
    "tied gradient added twice": "pipeline=2,micro_batch=3",
    "tied gradient counted twice": "pipeline=2,micro_batch=3,schedule=zbv",
    "ring off by one block": "context=2",
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
    expected = reference("sgd", True, 2, 0.0, dropout)
    results = ranks.run(
        "tests.equivalence.bugs:run", world(layout), bug=bug, layout=layout, steps=2, model="even", dropout=dropout
    )
    return cases.times_the_bound(results, expected)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_exceed_the_bound_a_hundred_times(ranks, bug):
    layout, dropout = PLANTED[bug], 0.2 if "dropout" in bug else 0.0
    assert times_the_bound(ranks, layout, "", dropout) <= 1
    times = times_the_bound(ranks, layout, bug, dropout)
    print(f"{layout}, {bug}: {times:.1e} times the bound")
    assert times > 100
