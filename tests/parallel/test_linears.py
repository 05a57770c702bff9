"""Layers cut by columns and rows, frozen or not, compute what plain PyTorch does; a plan that changes a value or a
gradient is refused."""

from __future__ import annotations

import pytest
import torch

from tests.parallel import linears_cases


@pytest.mark.parametrize(
    ("name", "layout"),
    [*((name, "tensor=2") for name in linears_cases.MODULES), ("frozen layers", "fsdp=2,tensor=2")],
)
def test_layers_that_are_cut_are_the_whole_ones(ranks, tmp_path, name: str, layout: str) -> None:
    # Weights are compared once they are saved and loaded: pieces of what is frozen are part of a checkpoint.
    entry, folder = "tests.parallel.linears_cases:run", str(tmp_path)
    expected = linears_cases.reference(name)
    for result in ranks.run(entry, 4 if "fsdp" in layout else 2, name=name, layout=layout, folder=folder):
        assert result["held_out"] == pytest.approx(expected["held_out"], rel=1e-8, abs=0)
        assert result["weights"].keys() == expected["weights"].keys()
        for key, right in expected["weights"].items():
            torch.testing.assert_close(
                torch.tensor(result["weights"][key], dtype=right.dtype), right, rtol=1e-8, atol=1e-12
            )


@pytest.mark.parametrize(
    ("name", "plan", "sentence"),
    [
        ("summed", linears_cases.PLAN, "'g' lies between columns and rows\n  → plan it as summed"),
        (
            "summed", linears_cases.PLAN | {"g": "summed", "after": "summed"},
            "the gradient of 'after' is another: every rank computes all of it\n  → leave it out of the plan",
        ),
        ("summed", {"up.weight": "columns"}, "and columns is of layers\n  → plan 'up' as columns"),
        ("frozen layers", {"down": "rows"}, "split as planned, the module fails on the example"),
        ("frozen layers", {"up": "columns", "down": "rows", "head": "rows"}, "split as planned, the module fails on"),
    ],
)  # fmt: skip
def test_a_plan_that_changes_something_is_refused(ranks, name: str, plan: dict[str, str], sentence: str) -> None:
    for said in ranks.run("tests.parallel.linears_cases:refused", 2, name=name, plan=plan):
        assert sentence in said
