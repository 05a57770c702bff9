"""`shoal.parallelize` says what depends on the layout, refuses what it cannot do before it computes, and needs no loss
to compute."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import shoal
from shoal.errors import JobError, LayoutError
from shoal.job import Layout
from shoal.job.layout import SCHEDULES
from shoal.launch.excluded import EXCLUDED
from tests.launch import parallelize_cases as cases

ENTRY = "tests.launch.parallelize_cases:"


def run(ranks, name: str, layout: str, **options):
    return ranks.run(f"{ENTRY}run", Layout.parse(layout).world, name=name, layout=layout, **options)


def test_ranks_draw_other_numbers_but_those_that_share_samples_the_same(ranks) -> None:
    a, b = (result["masks"] for result in ranks.run(f"{ENTRY}masks", 2, layout="replicas=2"))
    assert a != b
    assert a[0] != a[1]
    a, b, c, d = (result["masks"] for result in ranks.run(f"{ENTRY}masks", 4, layout="replicas=2,tensor=2"))
    assert a == b
    assert c == d
    assert a != c


@pytest.mark.parametrize("name", ["dropout", "attention with dropout"])
def test_chance_is_said_once(ranks, name: str) -> None:
    first, second = run(ranks, name, "replicas=2")
    assert [said for said in first["warned"] if "layouts agree on average only" in said] == first["warned"]
    assert len(first["warned"]) == 1
    assert not second["warned"]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dropout", "draws random numbers"),
        ("attention with dropout", "draws random numbers"),
        ("lstm with dropout", "draws random numbers"),
        ("own mode", "the example gives something else"),
        ("batch_norm", "computes with the statistics of the micro-batch"),
    ],
)
def test_evaluation_in_a_pipeline_is_refused_where_it_is_something_else(ranks, name: str, why: str) -> None:
    for said in run(ranks, name, "pipeline=2"):
        assert len(said["losses"]) == 2
        assert why in said["refused"]


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("attention", "pipeline=2"),
        ("lstm", "pipeline=2"),
        ("instance norm", "replicas=2"),
        ("instance norm", "pipeline=2"),
    ],
)
def test_what_does_not_depend_on_mode_or_micro_batch_is_not_refused(ranks, name: str, layout: str) -> None:
    expected = cases.reference(name)
    for said in run(ranks, name, layout):
        assert not said["refused"]
        assert not said["warned"]
        assert said["losses"] == pytest.approx(expected["losses"], rel=1e-10, abs=0)
        assert said["held_out"] == pytest.approx(expected["held_out"], rel=1e-10, abs=0)


@pytest.mark.parametrize("name", ["batch_norm", "batch_norm without statistics"])
def test_batch_norm_by_the_function_is_seen(ranks, name: str) -> None:
    for said in run(ranks, name, "replicas=2"):
        assert "batch_norm, which the module calls, computes with the statistics of a micro-batch" in said["refused"]
    first, second = run(ranks, name, "replicas=2,micro_batch=4", evaluate=False)
    assert not first["refused"]
    assert not second["warned"]
    assert [said.partition(":")[0] for said in first["warned"]] == (
        ["'mean' is written by the forward pass"] if name == "batch_norm" else []
    )


@pytest.mark.parametrize("layout", ["replicas=1", "replicas=2", "fsdp=2"])
def test_the_issues_call(ranks, layout: str) -> None:
    if layout != "replicas=1":
        results = ranks.run(f"{ENTRY}the_issues_call", 2, layout=layout)
    else:
        module, (x, y) = cases.build("net"), cases.batch()
        whole = module(x).tolist()
        with shoal.parallelize(module, layout) as trained:
            with pytest.raises(JobError, match="there is no loss") as refused:
                trained.step(trained.share((x, y)))
            held_out = trained.evaluate(trained.share((x, y)), loss=cases.loss)
            result = {"out": trained(x).tolist(), "whole": whole, "refused": str(refused.value), "held_out": held_out}
        results = [result]
    for result in results:
        torch.testing.assert_close(torch.tensor(result["out"]), torch.tensor(result["whole"]), rtol=1e-12, atol=0)
        assert result["held_out"] == pytest.approx(cases.reference("net", 0)["held_out"], rel=1e-12)
        assert result["refused"].startswith("there is no loss to compute\n  → shoal.parallelize(..., loss=...)")


def test_blocks_that_are_not_called_are_refused_by_fsdp(ranks) -> None:
    for said in run(ranks, "bypassed", "fsdp=2"):
        assert "weights of a repeated block are used where the block is not called" in said["refused"]
        assert "or replicas=2" in said["refused"]


def test_a_pipeline_computes_where_its_last_stage_is(ranks) -> None:
    x, _ = cases.batch()
    first, last = ranks.run(f"{ENTRY}forward", 2, layout="pipeline=2")
    assert first is None
    torch.testing.assert_close(torch.tensor(last, dtype=x.dtype), cases.build("net")(x[:4]), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "layout", ["pipeline=2,schedule=gpipe", "pipeline=2,fsdp=2,schedule=interleaved,micro_batch=4"]
)
def test_recomputation_keeps_less_and_changes_nothing(ranks, layout: str) -> None:
    world = Layout.parse(layout).world
    plain = ranks.run(f"{ENTRY}recomputed", world, layout=layout)
    again = ranks.run(f"{ENTRY}recomputed", world, layout=f"{layout},recompute=block")
    for a, b in zip(plain, again, strict=True):
        assert a["losses"] == b["losses"]
        assert a["held_out"] == b["held_out"]
    assert sum(b["kept"] for b in again) < 0.7 * sum(a["kept"] for a in plain)


def test_recomputation_is_refused_where_the_forward_pass_writes(ranks) -> None:
    with pytest.raises(
        LayoutError, match="'mean' is written by the forward pass, which recompute=block would run twice"
    ):
        run(ranks, "batch_norm", "pipeline=2,recompute=block")


@pytest.mark.parametrize(
    ("layout", "samples", "fix"),
    [("pipeline=2", 4, 8), ("pipeline=2,schedule=interleaved", 4, 8), ("pipeline=2,schedule=gpipe", 4, None)],
)
def test_too_few_micro_batches_are_refused_with_a_batch_that_would_do(ranks, layout: str, samples: int, fix) -> None:
    for said in run(ranks, "net", layout, samples=samples):
        if fix is None:
            assert not said["refused"]
            continue
        assert f"cannot run {samples // 4} micro-batch\n  → a batch of {fix} samples" in said["refused"]
        assert not said["chained"]
    if fix is not None:
        assert not run(ranks, "net", layout, samples=fix)[0]["refused"]


# With the nearest that it can have.
ASKED = {
    "context": ("context=2", "replicas=2"),
    "expert": ("fsdp=2,expert=2", "fsdp=2"),
    "pipeline with tensor": ("pipeline=2,tensor=2", "replicas=2,tensor=2"),
    "schedule=interleaved_zero_bubble, zbv or dualpipev": ("pipeline=2,schedule=zbv", "pipeline=2,schedule=1f1b"),
    "recompute=block without pipeline": ("fsdp=2,recompute=block", "fsdp=2"),
    "tensor_by=ring": ("tensor=2,tensor_by=ring", "tensor=2"),
    "replica_share": ("replicas=2,replica_share=3+1", "replicas=2"),
    "stages": ("pipeline=2,stages=3+5", "pipeline=2"),
}


@pytest.mark.parametrize("excluded", EXCLUDED, ids=lambda excluded: excluded.what)
def test_what_is_excluded_is_refused(excluded) -> None:
    asked, near = ASKED[excluded.what]
    with pytest.raises(LayoutError) as caught:
        shoal.parallelize(nn.Linear(2, 2), asked)
    fix = f"layout {Layout.parse(near)} would do; or {excluded.fix}"
    assert (caught.value.what, caught.value.fix) == (excluded.reason, fix)


def test_what_is_excluded_is_in_the_documentation() -> None:
    text = Path("docs/own-models.md").read_text(encoding="utf-8").partition("## Refused")[2].partition("\n## ")[0]
    rows = {tuple(cell.strip() for cell in row) for row in re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \|$", text, re.M)}
    assert rows == {(e.what, e.reason, e.fix) for e in EXCLUDED}
    # Taking one away, or adding one, needs an entry in docs/decisions.md, and this number changed.
    assert len(EXCLUDED) == 8
    assert set(EXCLUDED[3].what.removeprefix("schedule=").replace(" or ", ", ").split(", ")) < set(SCHEDULES)
