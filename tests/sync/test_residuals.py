"""Residuals in checkpoints: bit by bit in the same layout, their sum in any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import contents, manifest
from shoal.job import Layout
from shoal.models.spec import parameters
from tests.equivalence import cases
from tests.sync import residual_cases

CASES = "tests.sync.residual_cases"
# With pieces that two ranks of a replica have a part of each: norms and key heads, and a tied embedding's two ends.
LAYOUTS = [
    "replicas=3,micro_batch=2", "replicas=2,fsdp=2,zero=2,micro_batch=1", "replicas=2,tensor=2,micro_batch=2",
    "replicas=2,pipeline=2,schedule=zbv,micro_batch=2",
]  # fmt: skip
TWO_ENDS = pytest.param("replicas=2,pipeline=2,micro_batch=2", marks=pytest.mark.nightly)
# Key heads on two ranks each, and so experts.
EIGHT = pytest.param("replicas=2,tensor=4,expert=2,micro_batch=3", marks=pytest.mark.nightly)
OTHERS = [TWO_ENDS, "replicas=2,micro_batch=2", "replicas=4,micro_batch=1"]


def options(layout: str):
    return {"model": "qwen" if "expert" in layout else "borders", "optimizer": "sgd"}


def run(ranks, what: str, layout: str, **args):
    return ranks.run(f"{CASES}:{what}", Layout.parse(layout).world, layout=layout, **args, **options(layout))


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """saved(layout): what the ranks told that trained in it, and the folder of their checkpoint."""
    done = {}

    def once(layout: str):
        if layout not in done:
            root = tmp_path_factory.mktemp("residuals")
            told = run(ranks, "train", layout, root=str(root))
            done[layout] = told, root / f"step-{residual_cases.SAVED:08}"
        return done[layout]

    return once


@pytest.mark.parametrize("layout", [*LAYOUTS, TWO_ENDS, EIGHT])
def test_resumed_in_the_same_layout_is_bitwise_the_same(ranks, saved, layout):
    told, folder = saved(layout)
    again = run(ranks, "go_on", layout, folder=str(folder))
    for one, two in zip(told, again, strict=True):
        assert one["before"] == []
        assert one["saved"] == two["loaded"] != []
        for what in ("losses", "norms", "weights"):
            assert one[what] == two[what]


@pytest.mark.parametrize("layout", [*LAYOUTS, *OTHERS])
def test_what_was_lost_is_kept_in_another_layout_in_sum(ranks, saved, layout):
    """Of every parameter, over all replicas, the owners of sums, and ranks with a part of one gradient each."""
    folders = [str(saved(other)[1]) for other in LAYOUTS if other != layout]
    results = run(ranks, "only_load", layout, folders=folders)
    for index, folder in enumerate(folders):
        expected = of_checkpoint(folder)
        got = residual_cases.totals([of_rank[index] for of_rank in results], expected)
        for name, total in expected.items():
            assert total.count_nonzero() > 0.5 * total.numel(), name
            torch.testing.assert_close(got[name], total, rtol=0, atol=1e-12 * float(total.abs().max()))


def of_checkpoint(folder: str) -> dict[str, torch.Tensor]:
    """Of each parameter, all its residuals added up."""
    what = manifest.read(Path(folder))
    sums = {name: torch.zeros(what.tensors[name].shape).double() for name in contents.model_tensors(what)}
    names = [name for name in what.tensors if name.startswith("residual")]
    for name, tensor in checkpoint.tensors(Path(folder), names):
        sums[name.partition(".")[2]] += tensor
    return sums


def test_residuals_are_the_state_of_tensors_and_no_tensors_of_the_model(saved):
    """So that exports, conversions and lists leave them out."""
    _, folder = saved("replicas=2,tensor=2,micro_batch=2")
    told = contents.contents(folder)
    slots = ["residual@0", "residual@0-1", "residual@1", "residual@1-1", "residual-sum", "residual-sum-1"]
    assert {*told["kinds"]} == {"model", "momentum", *slots}
    assert told["kinds"]["residual@1"]["elements"] == told["kinds"]["model"]["elements"]


@pytest.mark.parametrize("layout", ["replicas=1", "replicas=2,tensor=2,micro_batch=2"])
def test_without_feedback_the_first_gradient_gets_all_that_was_lost(ranks, saved, layout):
    _, folder = saved(LAYOUTS[0])
    expected = of_checkpoint(folder)
    none, before, after, more = zip(*run(ranks, "pay", layout, folder=str(folder)), strict=True)
    assert [*none] == [*after] == [[]] * Layout.parse(layout).world
    for name, total in residual_cases.totals([*more], expected).items():
        torch.testing.assert_close(total, expected[name], rtol=0, atol=1e-11 * float(expected[name].abs().max()))
    assert {name for of_rank in before for name, _, _ in of_rank} == {f"residual-sum.{name}" for name in expected}


@pytest.mark.parametrize("layout", [*LAYOUTS[2:], EIGHT])
def test_all_gradients_were_applied_or_are_kept(ranks, layout):
    """Also where ranks of a replica each have a part of one gradient, so that no single process does the same."""
    given, there = zip(*run(ranks, "keep_books", layout), strict=True)
    shapes = parameters(cases.job("replicas=1", 1, **options(layout)).model)
    like = {name: torch.empty(spec.shape, dtype=torch.float64) for name, spec in shapes.items()}
    there = residual_cases.totals([*there], like)
    for name, total in residual_cases.totals([*given], like).items():
        torch.testing.assert_close(there[name], total, rtol=0, atol=1e-11 * float(total.abs().max()), msg=name)
        assert total.count_nonzero()
