"""One answer with experts: whichever axes spread the model, the expert axis with them or not, it computes what one
process computes: outputs, balance loss, capacity, and the bias that goes by the counts of the global batch.

The models: qwen2_moe's with a gated shared expert and balance loss; deepseek_v3's with latent attention, groups of
experts, capacity, balance loss and bias.
"""

from __future__ import annotations

import functools

import pytest

from tests.equivalence import bugs, cases, test_layouts

STEPS = 20

# All that a dense model is trained in, and what ranks share of the batch alone.
SINGLES = ["replicas=2,micro_batch=3", "fsdp=3,zero=2,micro_batch=2,recompute=block", *test_layouts.SINGLES]
PAIRS = test_layouts.PAIRS
SHARED = [
    ("qwen", "fsdp=2,expert=2,zero=1,micro_batch=3"),
    ("deepseek", "context=2,expert=2,micro_batch=6"),
    ("qwen", "tensor=2,expert=2,micro_batch=4,recompute=block"),
    ("deepseek", "fsdp=4,expert=2,micro_batch=1"),
    ("deepseek", "tensor=4,expert=2,micro_batch=6"),
    ("deepseek", "replicas=2,fsdp=2,expert=2,micro_batch=1"),
    ("qwen", "pipeline=2,fsdp=2,micro_batch=2,schedule=interleaved_zero_bubble,expert=2"),
    ("deepseek", "fsdp=2,tensor=2,expert=2,micro_batch=3"),
    ("qwen", "context=2,tensor=2,expert=4,micro_batch=6"),
    ("mixtral", "tensor=2,expert=2,micro_batch=6"),
    ("qwen3", "fsdp=2,expert=2,micro_batch=3"),
]
_AXES = [
    "fsdp=2,context=2,micro_batch=3",
    "fsdp=2,context=2,micro_batch=3,context_by=ulysses",
    "fsdp=2,tensor=2,micro_batch=3",
    "context=2,tensor=2,micro_batch=6",
    "replicas=2,fsdp=2,micro_batch=1",
    "replicas=2,tensor=2,micro_batch=3",
    "replicas=2,context=2,zero=1,micro_batch=3",
    "pipeline=2,fsdp=2,micro_batch=1,schedule=zbv",
    "pipeline=2,tensor=2,micro_batch=2,schedule=dualpipev",
    "pipeline=2,context=2,micro_batch=3,schedule=1f1b",
    "fsdp=2,context=2,tensor=2,micro_batch=3",
    "fsdp=4,zero=1,micro_batch=1,recompute=block",
    "replicas=2,fsdp=2,context=2,zero=2,micro_batch=1",
    "replicas=2,pipeline=2,fsdp=2,micro_batch=1,schedule=zbv",
]
EVERY = [
    *((model, layout) for model in ("qwen", "deepseek") for layout in [*SINGLES, *PAIRS]),
    *(("deepseek", layout) for layout in test_layouts.TRIPLES),
    *SHARED,
    *(
        (model, f"{axes},expert={ranks}")
        for model in ("qwen", "deepseek")
        for axes in _AXES
        for ranks in (2, 4)
        if cases.Layout.parse(axes).rest % ranks == 0
    ),
]


@pytest.mark.parametrize("row", [cases.Row(layout, "deepseek") for layout in SINGLES], ids=str)
def test_singles(ranks, row):
    cases.check(ranks, row)


@pytest.mark.parametrize("row", [cases.Row(layout, "deepseek") for layout in PAIRS], ids=str)
def test_pairs(ranks, row):
    cases.check(ranks, row)


@pytest.mark.parametrize("row", [cases.Row(layout, model) for model, layout in SHARED], ids=str)
def test_an_axis_of_their_own(ranks, row):
    cases.check(ranks, row)


@pytest.mark.parametrize("row", [cases.Row("fsdp=2,expert=2,micro_batch=3", "deepseek", optimizer="adamw")], ids=str)
def test_adam(ranks, row):
    cases.check(ranks, row)


@pytest.mark.parametrize("row", [cases.Row("tensor=2,expert=2,micro_batch=6", "deepseek", dropout=0.2)], ids=str)
def test_dropout(ranks, row):
    cases.check(ranks, row)


@pytest.mark.nightly
@pytest.mark.parametrize("row", [cases.Row(layout, model, STEPS) for model, layout in dict.fromkeys(EVERY)], ids=str)
def test_over_all_steps(ranks, row):
    cases.check(ranks, row)


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
    row = cases.Row(layout, model, steps=3)
    return cases.times_the_bound(bugs.results(ranks, bug, row), bugs.reference(row))


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_exceed_the_bound_a_hundred_times(ranks, bug):
    model, layout = PLANTED[bug]
    assert times_the_bound(ranks, model, layout, "") <= 1
    times = times_the_bound(ranks, model, layout, bug)
    print(f"{model}, {layout}, {bug}: {times:.1e} times the bound")
    assert times > 100
