"""Error feedback against one process that keeps residuals by itself, and against what it promises."""

from __future__ import annotations

import pytest
import torch

from shoal.job import Layout
from tests.equivalence import cases

STEPS = 10
OPTIONS = {"steps": STEPS, "optimizer": "sgd", "tied": False, "model": "even"}
CASES = "tests.sync.feedback_cases"

LAYOUTS = [
    "replicas=3,micro_batch=2", "replicas=2,fsdp=2,zero=3,micro_batch=1", "replicas=2,fsdp=2,zero=1,micro_batch=3",
    "replicas=2,pipeline=2,micro_batch=2",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_that_of_one_process_which_adds_what_was_lost(ranks, layout):
    """Through a codec that loses up to three quarters of each number, on both hops."""
    shape = Layout.parse(layout)
    results = ranks.run(f"{CASES}:train", shape.world, layout=layout, **OPTIONS)
    expected = cases.reference(replicas=shape.replicas, codec="coarse", feedback=True, **OPTIONS)
    cases.assert_one_answer(results, expected)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("replicas=2,fsdp=2,zero=1,micro_batch=1", "odd"),
        ("replicas=2,fsdp=2,zero=3,micro_batch=1", "odd"),
        ("replicas=2,fsdp=2,expert=2,micro_batch=3", "few experts"),
        ("replicas=2,context=2,zero=3,micro_batch=3", "deepseek"),
        ("replicas=2,tensor=2,micro_batch=2", "qwen"),
        ("replicas=2,pipeline=2,schedule=zbv,micro_batch=2", "even"),
    ],
)
def test_flat_tensors_say_where_each_parameter_lies_in_them(ranks, layout, model):
    """By addresses in memory: what `fully_shard` hands over nobody but PyTorch lays out."""
    for wrong in ranks.run(f"{CASES}:misplaced", 4, layout=layout, model=model):
        assert not wrong
