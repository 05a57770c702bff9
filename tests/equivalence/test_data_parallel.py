"""One answer: every data-parallel layout computes what one process computes (DESIGN §1.2)."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.equivalence import cases

STEPS = 20
LAYOUTS = [
    "replicas=1,micro_batch=4",
    "replicas=2",
    "replicas=2,micro_batch=2",
    "replicas=3,micro_batch=1",
    "fsdp=2,zero=1,micro_batch=2",
    "fsdp=2,zero=2,micro_batch=2",
    "fsdp=2,zero=3,micro_batch=2",
    "fsdp=3,zero=3",
    "replicas=2,fsdp=2,zero=1,micro_batch=1",
    "replicas=2,fsdp=2,zero=2,micro_batch=1",
    "replicas=2,fsdp=2,zero=3,micro_batch=1",
    "replicas=2,fsdp=2,zero=3,recompute=block",
]


@functools.cache
def reference(optimizer: str, tied: bool):
    return cases.reference(STEPS, optimizer, tied=tied)


def world(layout: str) -> int:
    return cases.Layout.parse(layout).world


@pytest.mark.parametrize(
    ("layout", "optimizer", "tied"),
    # AdamW hides a gradient of the wrong size, so SGD goes everywhere and AdamW where shards are cut or sums differ.
    [(layout, "sgd", True) for layout in LAYOUTS] + [(layout, "adamw", False) for layout in LAYOUTS[3::3]],
)
def test_float64_equals_one_process(ranks, layout, optimizer, tied):
    expected = reference(optimizer, tied)
    results = ranks.run(
        "tests.equivalence.cases:run", world(layout), layout=layout, steps=STEPS, optimizer=optimizer, tied=tied
    )
    for name, gradient in expected["gradients"].items():
        got = cases.whole(results, "gradients", name, gradient)
        assert (got - gradient).norm() <= 1e-10 * gradient.norm(), f"gradient of {name}"
    for result in results:
        assert result["losses"] == pytest.approx(expected["losses"], rel=1e-8, abs=0)
        assert result["norms"] == pytest.approx(expected["norms"], rel=1e-8, abs=0)
    for name, weight in expected["weights"].items():
        got = cases.whole(results, "weights", name, weight)
        assert (got - weight).norm() <= 1e-8 * weight.norm(), f"weights of {name}"
    # The comparison means something only where the job learns.
    assert expected["losses"][-1] < 0.95 * expected["losses"][0]


@functools.cache
def noise_floor(ranks, precision: str) -> tuple[list[float], float]:
    """(losses of one process, how far they move when that one process only adds in another order)."""

    def losses(layout: str, order: int) -> list[float]:
        one = ranks.run("tests.equivalence.cases:run", 1, layout=layout, steps=STEPS, precision=precision, order=order)
        return one[0]["losses"]

    base = losses("replicas=1", 0)
    reordered = [losses("replicas=1", 1), losses("replicas=1,micro_batch=4", 2), losses("replicas=1,micro_batch=1", 3)]
    return base, max(abs(a - b) for row in reordered for a, b in zip(row, base, strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["replicas=3,micro_batch=2", "replicas=2,fsdp=2,zero=2,micro_batch=1", "fsdp=3"])
def test_low_precision_stays_within_four_noise_floors(ranks, layout, precision):
    base, floor = noise_floor(ranks, precision)
    results = ranks.run("tests.equivalence.cases:run", world(layout), layout=layout, steps=STEPS, precision=precision)
    difference = max(abs(a - b) for a, b in zip(results[0]["losses"], base, strict=True))
    print(f"{precision} {layout}: difference {difference:.2e}, noise floor {floor:.2e}")
    assert 0 < floor < 0.1
    assert difference <= 4 * floor


BUGS = {
    "mean over micro-batches": "mean",
    "gradient scaled by the ranks": "scaled",
    "a bucket is not reduced": "bucket",
    "normalised by this rank's tokens": "local",
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_planted_bugs_exceed_the_bound_a_hundred_times(ranks, bug):
    expected = reference("sgd", True)
    results = ranks.run("tests.equivalence.bugs:run", 2, bug=bug, layout="replicas=2,micro_batch=2", steps=1)
    worst = 0.0
    for name, gradient in expected["gradients"].items():
        for result in results:
            got = torch.tensor(result["gradients"][name], dtype=torch.float64)
            worst = max(worst, float((got - gradient).norm() / gradient.norm()))
    assert worst > 100 * 1e-10
