"""One answer: every data-parallel layout computes what one process computes."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch

from tests.equivalence import cases

STEPS, FEWER = 20, 6
IN_LOW_PRECISION = 8
LAYOUTS = [
    "replicas=1,micro_batch=4",
    "replicas=2,micro_batch=3",
    "replicas=2,micro_batch=2",
    "replicas=3,micro_batch=1",
    "fsdp=2,zero=1,micro_batch=2",
    "fsdp=2,zero=2,micro_batch=2",
    "fsdp=2,zero=3,micro_batch=2",
    "fsdp=3,zero=1,micro_batch=2",
    "fsdp=3,zero=2,micro_batch=2",
    "fsdp=3,zero=3,micro_batch=2",
    "replicas=2,fsdp=2,zero=1,micro_batch=1",
    "replicas=2,fsdp=2,zero=2,micro_batch=1",
    "replicas=2,fsdp=2,zero=3,micro_batch=1",
    "replicas=2,fsdp=2,zero=3,micro_batch=1,recompute=block",
]


def world(layout: str) -> int:
    return cases.Layout.parse(layout).world


# AdamW hides a gradient of the wrong size, so SGD goes everywhere and AdamW where shards are cut or sums differ.
ROWS = [
    *(cases.Row(layout, "odd", FEWER) for layout in LAYOUTS),
    *(cases.Row(layout, "odd", FEWER, "adamw") for layout in LAYOUTS[3::3]),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_float64_equals_one_process(ranks, row):
    cases.check(ranks, row)


@pytest.mark.nightly
@pytest.mark.parametrize("row", [cases.Row(layout, "odd", STEPS) for layout in LAYOUTS], ids=str)
def test_over_all_steps(ranks, row):
    cases.check(ranks, row)


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
def test_float64_compiled_equals_one_process_uncompiled(ranks):
    """One layer and two steps: compiling takes nearly all of the time."""
    options = {"steps": 2, "optimizer": "sgd", "layers": 1, "clip": 0.0}
    expected = cases.reference(**options)
    results = ranks.run("tests.equivalence.cases:run", 2, layout="replicas=2", compile="on", **options)
    assert max(cases.gradient_errors(results, expected["gradients"]).values()) <= 1e-10
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-8, abs=0)


@functools.cache
def noise_floor(ranks, precision: str) -> tuple[list[float], float]:
    """(losses of one process, how far they move when that one process only adds in another order)."""

    def losses(layout: str, order: int) -> list[float]:
        one = ranks.run(
            "tests.equivalence.cases:run", 1, layout=layout, steps=IN_LOW_PRECISION, precision=precision, order=order
        )
        return one[0]["losses"]

    base = losses("replicas=1", 0)
    reordered = [losses("replicas=1", 1), losses("replicas=1,micro_batch=4", 2), losses("replicas=1,micro_batch=1", 3)]
    return base, max(abs(a - b) for row in reordered for a, b in zip(row, base, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["replicas=3,micro_batch=2", "replicas=2,fsdp=2,zero=2,micro_batch=1", "fsdp=3"])
def test_low_precision_stays_within_four_noise_floors(ranks, layout, precision):
    base, floor = noise_floor(ranks, precision)
    results = ranks.run(
        "tests.equivalence.cases:run", world(layout), layout=layout, steps=IN_LOW_PRECISION, precision=precision
    )
    difference = max(abs(a - b) for a, b in zip(results[0]["losses"], base, strict=True))
    print(f"{precision} {layout}: difference {difference:.2e}, noise floor {floor:.2e}")
    assert 0 < floor < 0.1
    assert difference <= 4 * floor


# A floor above these (5 and 2.7 times what was measured) is itself broken and must not widen the bound.
# Not the distance from float64: 4 times bf16's (up to 0.06) hides the wrong normaliser, which is off by 0.16.
LARGEST_FLOOR = {"fp32": 2e-6, "bf16": 8e-3}


@functools.cache
def gradient_floor(ranks, precision: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """(first gradients of one process, how far each moves when that one process only adds in another order)."""

    def one(layout: str, order: int):
        return ranks.run(
            "tests.equivalence.bugs:run", 1, bug="", layout=layout, steps=1, precision=precision, order=order
        )

    base = {n: torch.tensor(g, dtype=torch.float64) for n, _, g in one("replicas=1", 0)[0]["gradients"]}
    reordered = [one("replicas=1", 1), one("replicas=1,micro_batch=4", 2), one("replicas=1,micro_batch=1", 3)]
    errors = [cases.gradient_errors(results, base) for results in reordered]
    floor = {name: max(row[name] for row in errors) for name in base}
    assert 0 < min(floor.values()) <= max(floor.values()) < LARGEST_FLOOR[precision]
    # Else bf16 would not be computed in bf16.
    assert precision == "fp32" or min(floor.values()) > 10 * LARGEST_FLOOR["fp32"]
    return base, floor


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["replicas=2", "fsdp=2,zero=1", "fsdp=2,zero=2", "fsdp=2,zero=3"])
def test_low_precision_gradients_stay_within_four_noise_floors(ranks, layout, precision):
    """AdamW hides a gradient of the wrong size from the losses, so gradients are compared. "mean" divides by each
    rank's own tokens: the documents are uneven, and even a floor at its cap would not hide that."""
    base, floor = gradient_floor(ranks, precision)

    def errors(bug: str) -> dict[str, float]:
        results = ranks.run("tests.equivalence.bugs:run", 2, bug=bug, layout=layout, steps=1, precision=precision)
        return cases.gradient_errors(results, base)

    right, wrong = errors(""), max(errors("mean").values())
    worst = max(right[name] / floor[name] for name in base)
    print(f"{precision} {layout}: {worst:.2f} noise floors (up to {max(floor.values()):.2e}), planted {wrong:.2e}")
    assert worst <= 4
    assert wrong > 4 * LARGEST_FLOOR[precision]


SHARDED = ["forgotten", "divided", "stale"]
PLANTED = {
    "replicas=2,micro_batch=2": ["mean", "scaled", "alone", "bucket", "local", "forgotten"],
    **{f"fsdp=2,zero={z},micro_batch=2": [*SHARDED, "local", "unreduced", "misplaced", "own norm"] for z in (1, 2, 3)},
    **{f"replicas=2,fsdp=2,zero={z},micro_batch=1": [*SHARDED, "alone", "bucket"] for z in (1, 2, 3)},
}


@functools.cache
def unclipped():
    return cases.reference(2, optimizer="sgd", clip=0.0)


def times_the_bound(ranks, layout: str, bug: str) -> float:
    """The worst of the first gradient (bound 1e-10) and of two steps' losses and norms (1e-8): some bugs need an
    update before they show, or show in the norm alone."""
    expected = unclipped()
    results = ranks.run("tests.equivalence.bugs:run", world(layout), bug=bug, layout=layout, steps=2)
    return cases.times_the_bound(results, expected)


@pytest.mark.parametrize("layout", PLANTED)
def test_without_a_planted_bug_the_same_runs_are_within_the_bound(ranks, layout):
    assert times_the_bound(ranks, layout, "") <= 1


@pytest.mark.parametrize(("layout", "bug"), [(layout, bug) for layout, bugs in PLANTED.items() for bug in bugs])
def test_planted_bugs_exceed_the_bound_a_hundred_times(ranks, layout, bug):
    times = times_the_bound(ranks, layout, bug)
    print(f"{layout}, {bug}: {times:.1e} times the bound")
    assert times > 100
