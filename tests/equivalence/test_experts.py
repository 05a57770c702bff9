"""One answer with experts: whichever axes spread the model, the expert axis with them or not, it computes what one
process computes: outputs, balance loss, capacity, and the bias that goes by the counts of the global batch.

The models: qwen2_moe's with a gated shared expert and balance loss; deepseek_v3's with latent attention, groups of
experts, capacity, balance loss and bias.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.equivalence import cases

STEPS = 8

WITHOUT = [
    ("qwen", "replicas=2,micro_batch=3"),
    ("deepseek", "fsdp=3,zero=2,micro_batch=2,recompute=block"),
    ("deepseek", "pipeline=2,micro_batch=2,schedule=zbv"),
    ("deepseek", "context=2,micro_batch=6"),
    ("qwen", "tensor=2"),
    ("deepseek", "tensor=2"),
]
SINGLES = [
    ("qwen", "fsdp=2,expert=2,zero=1,micro_batch=3"),
    ("deepseek", "context=2,expert=2"),
    ("qwen", "tensor=2,expert=2,micro_batch=4,recompute=block"),
    ("deepseek", "fsdp=4,expert=2"),
    ("deepseek", "tensor=4,expert=2"),
]
PAIRS = [
    ("deepseek", "replicas=2,fsdp=2,expert=2,micro_batch=3"),
    ("qwen", "pipeline=2,fsdp=2,micro_batch=2,schedule=interleaved_zero_bubble,expert=2"),
    ("deepseek", "fsdp=2,tensor=2,expert=2"),
    ("qwen", "context=2,tensor=2,expert=4"),
]
_AXES = {
    "replicas=2": "replicas=2,fsdp=2",
    "pipeline=2": "pipeline=2,fsdp=2,micro_batch=2,schedule=zbv",
    "fsdp": "fsdp=2,context=2",
    "context": "context=2,tensor=2",
    "tensor": "tensor=2,fsdp=2",
    "ulysses": "context=2,fsdp=2,context_by=ulysses",
    "replicas and tensor": "replicas=2,tensor=2",
    "replicas and context": "replicas=2,context=2,zero=1",
    "pipeline and tensor": "pipeline=2,tensor=2,micro_batch=2,schedule=dualpipev",
    "pipeline and context": "pipeline=2,context=2,micro_batch=3,schedule=1f1b",
    "all": "fsdp=2,context=2,tensor=2,micro_batch=3",
    "stage 1": "fsdp=4,zero=1,micro_batch=1,recompute=block",
    "stage 2": "replicas=2,fsdp=2,context=2,zero=2,micro_batch=1",
    "whole pieces": "replicas=2,pipeline=2,fsdp=2,micro_batch=1,schedule=zbv",
}
EVERY = [(model, f"{axes},expert={n}") for model in ("qwen", "deepseek") for axes in _AXES.values() for n in (2, 4)]


@functools.cache
def reference(model: str, optimizer: str = "sgd", steps: int = STEPS, clip: float = 0.5) -> dict[str, Any]:
    return cases.reference(steps, optimizer=optimizer, tied=True, model=model, clip=clip)


def fits(layout: str) -> bool:
    what = cases.Layout.parse(layout.rpartition(",")[0])
    return what.rest % int(layout.rpartition("=")[2]) == 0


def check(ranks, model: str, layout: str, optimizer: str = "sgd") -> None:
    """The bounds of the design: gradients 1e-10, all else 1e-8."""
    expected = reference(model, optimizer)
    results = ranks.run(
        "tests.equivalence.cases:run", cases.Layout.parse(layout).world, layout=layout, steps=STEPS,
        optimizer=optimizer, model=model,
    )  # fmt: skip
    cases.assert_one_answer(results, expected)


@pytest.mark.parametrize(("model", "layout"), WITHOUT)
def test_without_an_axis_of_their_own(ranks, model, layout):
    check(ranks, model, layout)


@pytest.mark.parametrize(("model", "layout"), SINGLES)
def test_singles(ranks, model, layout):
    check(ranks, model, layout)


@pytest.mark.parametrize(("model", "layout"), PAIRS)
def test_pairs(ranks, model, layout):
    check(ranks, model, layout)


def test_adam(ranks):
    check(ranks, "deepseek", "fsdp=2,expert=2,micro_batch=3", "adamw")


@pytest.mark.nightly
@pytest.mark.parametrize(("model", "layout"), [case for case in EVERY if fits(case[1])])
def test_every_pair(ranks, model, layout):
    check(ranks, model, layout)


# Each with a model and a layout in which it can happen.
PLANTED = {
    "balance loss of the row on each rank": ("qwen", "context=2"),
    "counts of one rank": ("deepseek", "fsdp=2,expert=2"),
    "statistics of a rank's part of the row": ("deepseek", "context=2"),
    "expert gradients summed twice": ("qwen", "tensor=4,expert=2"),
    "expert gradients not summed": ("qwen", "tensor=4,expert=2"),
    "router gradient not summed": ("qwen", "tensor=2"),
    "experts of the next rank": ("deepseek", "fsdp=2,expert=2"),
}


@functools.cache
def times_the_bound(ranks, model: str, layout: str, bug: str) -> float:
    """The worst of the first gradient (bound 1e-10) and of three steps' losses and norms (1e-8)."""
    expected = reference(model, steps=3, clip=0.0)
    world = cases.Layout.parse(layout).world
    results = ranks.run("tests.equivalence.bugs:run", world, bug=bug, layout=layout, steps=3, model=model)
    return cases.times_the_bound(results, expected)


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_exceed_the_bound_a_hundred_times(ranks, bug):
    model, layout = PLANTED[bug]
    assert times_the_bound(ranks, model, layout, "") <= 1
    times = times_the_bound(ranks, model, layout, bug)
    print(f"{model}, {layout}, {bug}: {times:.1e} times the bound")
    assert times > 100
