"""One answer with Muon, whose steps are of whole matrices: however ranks share these, what one process computes."""

from __future__ import annotations

import functools
from math import prod

import pytest

from shoal.models.spec import parameters
from tests.equivalence import cases, test_experts, test_layouts
from tests.optim.reference import is_hidden

STEPS = 20

# Matrices that are whole; cut by rows, also within q, k, v that are stored as one; cut by heads, by columns, with key
# heads on two ranks each; several of these; experts on some ranks, or on several alike.
ROWS = [
    ("even", "replicas=2,micro_batch=3"),
    ("even", "pipeline=2,micro_batch=3"),
    ("borders", "fsdp=2,micro_batch=3"),
    ("borders", "fsdp=3,micro_batch=2"),
    ("even", "tensor=2,micro_batch=6"),
    ("even", "tensor=4,micro_batch=6"),
    ("borders", "fsdp=2,tensor=2,micro_batch=3,zero=2"),
    ("even", "replicas=2,fsdp=2,micro_batch=1"),
    ("even", "pipeline=2,fsdp=2,micro_batch=2,schedule=zbv"),
    ("deepseek", "context=2,tensor=2,micro_batch=6"),
    ("deepseek", "fsdp=2,tensor=2,expert=2,micro_batch=3"),
    ("qwen", "tensor=2,expert=2,micro_batch=6"),
]
EVERY = [
    *(("even", layout) for layout in [*test_experts.SINGLES, *test_layouts.PAIRS]),
    *test_experts.SHARED,
    *(("deepseek", layout) for layout in test_layouts.TRIPLES),
]


@pytest.mark.parametrize("row", [cases.Row(layout, model, optimizer="muon") for model, layout in ROWS], ids=str)
def test_layouts(ranks, row):
    cases.check(ranks, row)


@pytest.mark.nightly
@pytest.mark.parametrize("row", [cases.Row(layout, model, STEPS, "muon") for model, layout in EVERY], ids=str)
def test_over_all_steps(ranks, row):
    cases.check(ranks, row)


# Each with a model and a layout in which it can happen.
PLANTED = {
    "what is stored as one is one matrix": ("even", "replicas=1"),
    "all experts are one matrix": ("qwen", "replicas=1"),
    "each rank's piece is a matrix": ("even", "fsdp=2"),
    "the output layer is a matrix of a block": ("even", "fsdp=2"),
}


@functools.cache
def times_the_bound(ranks, model: str, layout: str, bug: str) -> float:
    """The worst of the first gradient (bound 1e-10) and of three steps' losses and norms (1e-8)."""
    row = cases.Row(layout, model, 3, "muon")
    options = row.options | {"bug": bug}
    results = ranks.run("tests.optim.muon_cases:run", cases.Layout.parse(layout).world, **options)
    del options["layout"], options["bug"]
    return cases.times_the_bound(results, cases.reference(**options))


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bugs_exceed_the_bound_a_hundred_times(ranks, bug):
    model, layout = PLANTED[bug]
    assert times_the_bound(ranks, model, layout, "") <= 1
    times = times_the_bound(ranks, model, layout, bug)
    print(f"{model}, {layout}, {bug}: {times:.1e} times the bound")
    assert times > 100


@pytest.mark.parametrize(("model", "layout"), [("borders", "fsdp=2,tensor=2,micro_batch=3"), ("qwen", "fsdp=4")])
def test_a_few_matrices_at_a_time(ranks, model, layout):
    """Of so many numbers that the matrices of this model take several rounds."""
    options = cases.Row(layout, model, 3, "muon").options
    results = ranks.run("tests.optim.muon_cases:run", 4, at_once=300, **options)
    assert all(result["rounds"] > 2 for result in results)
    del options["layout"]
    cases.assert_one_answer(results, cases.reference(**options))


@pytest.mark.parametrize("layout", ["replicas=2", "pipeline=2,micro_batch=3", "fsdp=2", "fsdp=4", "tensor=2"])
def test_what_is_whole_is_not_sent_and_what_is_cut_no_more_than_twice(ranks, layout):
    """To whoever computes with it, and back."""
    options = cases.Row(layout, "even", 2, "muon").options
    world = cases.Layout.parse(layout).world
    results = ranks.run("tests.optim.muon_cases:run", world, **options)
    model = cases.job(**options).model
    numbers = sum(prod(s.shape) for name, s in parameters(model).items() if is_hidden(name, s.shape))
    of_step = sum(sum(result["sent"]) for result in results) / options["steps"]
    if "fsdp" in layout or "tensor" in layout:
        assert all(len(result["sent"]) == 2 * options["steps"] for result in results)
        assert 0 < of_step <= 2 * numbers * (1 - 1 / world)
    else:
        assert of_step == 0
