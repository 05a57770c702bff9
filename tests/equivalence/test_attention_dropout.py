"""One answer with dropout of attention's probabilities: every layout that may have it makes one process's masks."""

from __future__ import annotations

import pytest
import torch

from shoal.models import build
from shoal.models.spec import parameters
from shoal.ops.initialise import initialise_
from shoal.training.objective import Objective
from tests.equivalence import bugs, cases
from tests.models import experts

RATE = 0.2

# "even": two key heads for four query heads; with tensor=4 each lies on two ranks. deepseek: latent attention.
LAYOUTS = [
    ("even", "replicas=2,micro_batch=1"),
    ("even", "fsdp=2,micro_batch=3,recompute=block"),
    ("even", "pipeline=2,micro_batch=2,schedule=zbv"),
    ("even", "tensor=2,micro_batch=6"),
    ("even", "tensor=4,micro_batch=6,recompute=block"),
    ("deepseek", "tensor=2,micro_batch=4,recompute=block"),
    ("even", "pipeline=2,tensor=2,micro_batch=3"),
]


def row(model: str, layout: str, steps: int = 6, rate: float = RATE) -> cases.Row:
    return cases.Row(layout, model, steps, attention_dropout=rate)


@pytest.mark.parametrize("row", [row(*case) for case in LAYOUTS], ids=str)
def test_layouts(ranks, row):
    cases.check(ranks, row)


def test_it_changes_the_answer():
    losses = [bugs.reference(row("even", "tensor=2", 2, rate))["losses"] for rate in (0.0, RATE)]
    assert abs(losses[0][0] / losses[1][0] - 1) > 1e-4


@pytest.mark.parametrize("bug", ["heads numbered on each rank"])
def test_planted_bugs_exceed_the_bound_a_hundred_times(ranks, bug):
    case = row("even", "tensor=2", 2)
    times = {
        planted: cases.times_the_bound(bugs.results(ranks, planted, case), bugs.reference(case))
        for planted in ("", bug)
    }
    print(f"{bug}: {times[bug]:.1e} times the bound")
    assert times[""] <= 1
    assert times[bug] > 100


def test_evaluation_has_none():
    model, batch = build(cases.EVEN).double(), cases.global_batch(0)
    fills = parameters(model.options)
    for name, tensor in experts.canonical(model):
        initialise_(tensor.detach(), name, tuple(tensor.shape), (0,) * tensor.ndim, fills[name].fill, 5)
    without, with_ = Objective("fp64"), Objective("fp64", attention_dropout=RATE)
    assert without(model, batch)[0] != with_(model, batch)[0]
    with torch.no_grad():
        assert without(model, batch)[0] == with_(model, batch)[0]
