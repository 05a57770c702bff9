"""`shoal check`: right layouts pass, a planted bug does not, and what a job cannot have is refused with its reason."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from shoal import check
from shoal.cli.main import main
from shoal.errors import JobError
from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.every import MOST_PROCESSES, layouts, refusal, small
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions
from shoal.launch.check import Row
from tests.launch.wrong import NORM

DOCS = Path(__file__).parents[2] / "docs" / "check.md"


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Job:
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number}.txt").write_text("the shoal swims over the reef and back again. " * (10 + number))
    return Job(
        data=DataOptions(source=(str(folder),), cache=str(folder / "cache"), tokenizer="bytes", sequence_length=64),
        model=ModelOptions(num_hidden_layers=8, hidden_size=64),
        train=TrainOptions(steps=10, global_batch=24),
    )


@pytest.fixture(autouse=True)
def shared_ranks(request, monkeypatch):
    """`check` takes the ranks of all tests; it starts its own where the command line is tried."""
    if "command_line" not in request.node.name:
        pool = request.getfixturevalue("ranks")
        monkeypatch.setattr("shoal.launch.check.Pool", lambda most, preload: nullcontext(pool))


def test_layouts_of_a_job_compute_the_same_and_impossible_ones_are_refused(job):
    rows = []
    only = ["pipeline=2,tensor=2", "replicas=2", "tensor=3"]
    report = check(job, only=only, dtypes=("fp64", "bf16"), steps=6, on_row=rows.append)
    assert not report.ok  # one was asked for by name and cannot be
    assert report.rows == rows
    told = [(row.layout, row.dtype, row.optimizer) for row in rows]
    names = ["pipeline=2,tensor=2", "replicas=2"]
    kinds = [("fp64", "sgd"), ("fp64", "adamw"), ("bf16", "adamw")]
    assert told == [(name, *kind) for kind in kinds for name in names]
    for row, ran in zip(
        rows, ["pipeline=2,tensor=2,micro_batch=1,schedule=1f1b", "replicas=2,micro_batch=1"] * 3, strict=True
    ):
        assert row.ran == ran
    for row in rows:
        assert row.ok, row
        assert row.same_samples
        assert all(difference <= bound for difference, bound in row.pairs().values())
        assert row.bound_grad == 1e-10 if row.dtype == "fp64" else row.bound_grad >= 2**-8
    assert [(r.layout, "heads" in r.reason) for r in report.refused] == [("tensor=3", True)]


@pytest.mark.nightly
@pytest.mark.parametrize(
    "only",
    [
        ["replicas=2,replica_share=2+1,micro_batch=4"],
        pytest.param(["fsdp=3"], marks=pytest.mark.nightly),
        ["pipeline=2,stages=5+3", "pipeline=2,micro_batch=3"],
    ],
)
def test_what_the_job_can_have_the_small_one_can_too(job, only):
    """Whatever its replicas do otherwise."""
    job = replace(job, sync=SyncOptions(name="local", codec="int8", pace="2+1"))
    report = check(job, only=only, steps=6)
    assert report.ok, report
    assert len(report.rows) == 2 * len(only)


@pytest.mark.parametrize("bug", ["label", "sample"])
def test_a_planted_bug_is_found_and_named(job, bug):
    report = check(job, only=["fsdp=2"], steps=6, entry=f"tests.launch.wrong:{bug}")
    assert not report.ok
    assert not any(row.ok for row in report.rows)
    assert all(row.same_samples == (bug == "label") for row in report.rows)


ONE_KEY = {"num_attention_heads": 4, "num_key_value_heads": 1}


# Each with a layout that has it, the model where it matters, and what must exceed its bound.
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("bug", "layout", "model", "what"),
    [
        ("tied_added_twice", "pipeline=2", {"tie_word_embeddings": True}, "gradient"),
        ("keys_counted_twice", "tensor=2", ONE_KEY, "loss"),
        ("ring_off", "context=3", {}, "gradient"),
        ("balance_of_a_rank", "context=2", "experts", "gradient"),
    ],
)
def test_a_layout_that_is_wrong_is_found_and_its_neighbour_is_right(job, tmp_path, bug, layout, model, what):
    more = EXPERTS if model == "experts" else model
    # Short ones, many in a row: else a ring that mistakes the chunk before for its own sees the same document.
    for number in range(400):
        (tmp_path / f"{number}.txt").write_text("the shoal swims over the reef"[: 8 + number % 20])
    job = replace(
        job,
        model=ModelOptions(num_hidden_layers=4, hidden_size=64, **more),
        data=replace(job.data, source=(str(tmp_path),), cache=str(tmp_path / "cache"), sequence_length=48),
        optim=OptimOptions(name="sgd"),
    )
    report = check(job, processes=3, only=["replicas=2", layout], steps=4, entry=f"tests.launch.wrong:{bug}")
    right, wrong = report.rows
    assert right.ok, right
    assert (wrong.layout, wrong.ok, wrong.same_samples) == (layout, False, True)
    found, bound = wrong.pairs()[what]
    assert found > 10 * bound, wrong


def test_a_rank_that_fails_is_a_row_that_says_so(job):
    report = check(job, only=["fsdp=2", "replicas=2"], steps=6, entry="tests.launch.wrong:raises_in_fsdp")
    assert [row.ok for row in report.rows] == [False, True] * 2
    assert "planted" in report.rows[0].error


def test_an_optimizer_that_does_not_learn_is_rows_that_say_so_beside_the_others(job):
    only = ["replicas=2", "tensor=2"]
    report = check(job, only=only, steps=4, entry="tests.launch.wrong:learns_nothing_with_sgd")
    assert not report.ok
    assert [(row.layout, row.optimizer, row.ok) for row in report.rows] == [
        *[(text, "sgd", False) for text in only], *[(text, "adamw", True) for text in only]
    ]  # fmt: skip
    assert all("does not learn with sgd" in row.error and "--check-steps" in row.error for row in report.rows[:2])


def test_what_is_no_difference_is_an_error(job):
    (row, _) = check(job, only=["replicas=2"], steps=4, entry="tests.launch.wrong:ends_early").rows
    assert not row.ok
    assert row.max_rel_diff_loss == float("inf")
    assert "of fewer steps" in row.error


def test_ok_follows_from_the_differences_and_the_bound():
    row = Row("tensor=2", 20, "fp64", 5e-9, 1e-12, 1e-12, bound_grad=1e-10, bound_loss=1e-8, bound_weights=1e-8)
    assert (row.judged().ok, row.judged().bound) == (False, 1e-10)
    row = replace(row, max_rel_diff_grad=1e-11, max_rel_diff_loss=9e-9)
    assert (row.judged().ok, row.judged().bound) == (True, 1e-8)
    row = replace(row, max_rel_diff_loss=2e-8)
    assert (row.judged().ok, row.judged().bound) == (False, 1e-8)
    row = replace(row, max_rel_diff_loss=float("nan"))
    assert not row.judged().ok
    assert not replace(row, max_rel_diff_loss=0.0, error="other samples").judged().ok


LOW = ("bf16", "fp32")


@pytest.mark.nightly
def test_layouts_that_share_one_sequence_reader_are_checked_in_low_precision_too(job):
    only = ["tensor=2", "context=2", "pipeline=2", "fsdp=3"]
    report = check(job, processes=3, only=only, dtypes=LOW, steps=4)
    assert [(row.dtype, row.layout) for row in report.rows] == [(dtype, layout) for dtype in LOW for layout in only]
    assert report.ok, [row for row in report.rows if not row.ok]


NIGHTLY = [pytest.param(bug, marks=pytest.mark.nightly) for bug in ("label", "norm_averaged", "norm_turned_later")]


@pytest.mark.parametrize("bug", ["norm_not_summed", *NIGHTLY])
def test_low_precision_sees_what_is_wrong_with_one_label_or_one_small_parameter(job, bug):
    later = bug == "norm_turned_later"
    steps, entry = 8 if later else 4, f"tests.launch.wrong:{bug}"
    report = check(job, processes=2, only=["tensor=2"], dtypes=LOW, steps=steps, entry=entry)
    assert len(report.rows) == 2
    for row in report.rows:
        assert not row.ok
        found, bound = row.pairs()["weights" if later else "gradient"]
        assert found > (1.5 if later else 3) * bound, row
        if bug == "norm_not_summed":
            assert "norm.weight: two ranks hold different copies" in row.error
        elif bug == "norm_averaged":
            assert (row.worst_grad, round(found, 1)) == (NORM, 0.5)
        elif bug == "norm_turned_later":
            assert row.worst_weights == NORM


EXPERTS = {
    "family": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "qkv_bias": True, "router_aux_loss_coef": 0.1,
}  # fmt: skip


@pytest.mark.nightly
def test_experts_are_checked_in_low_precision_too(job):
    report = check(
        replace(job, model=ModelOptions(num_hidden_layers=4, hidden_size=64, **EXPERTS)),
        processes=2,
        only=["fsdp=2,expert=2"],
        dtypes=("fp64", "bf16"),
        steps=6,
    )
    assert report.ok, report
    assert [(row.dtype, row.optimizer) for row in report.rows] == [
        ("fp64", "sgd"), ("fp64", "adamw"), ("bf16", "adamw")
    ]  # fmt: skip


@pytest.mark.nightly
def test_every_layout_of_two_processes_without_being_named(job):
    report = check(job, processes=2, steps=4)
    assert report.ok, [row for row in report.rows if not row.ok]
    assert len(report.rows) == 2 * (len(layouts(2)) - len(report.refused)) > 40


@pytest.mark.nightly
def test_every_layout_of_four_processes_of_a_dense_job(job):
    report = check(replace(job, optim=OptimOptions(name="sgd")), processes=4, steps=3)
    assert report.ok, [row for row in report.rows if not row.ok]
    assert len(report.rows) == len(layouts(4)) - len(report.refused) > 80


@pytest.mark.parametrize(
    ("processes", "only", "what", "fix"),
    [
        (2, ["fsdp=2", "tensor=4"], "layout tensor=4 is of 4 ranks, and processes=2", "--processes 4"),
        (0, ["fsdp=64"], "layout fsdp=64 is of 64 ranks", "32 or less"),
        (100_000, [], "processes=100000 is more than 32", "32 or less"),
        (1, [], "processes=1 is less than 2", "2 or more"),
    ],
)
def test_what_so_many_processes_cannot_check_is_refused(job, processes, only, what, fix):
    assert MOST_PROCESSES == 32  # as help and docs/check.md say
    with pytest.raises(JobError) as caught:
        check(job, processes=processes, only=only)
    assert what in caught.value.what
    assert fix in caught.value.fix


@pytest.mark.nightly
@pytest.mark.parametrize(("more", "least"), [({}, 80), (EXPERTS, 50)], ids=["dense", "experts"])
def test_every_layout_of_eight_processes(job, more, least):
    """All of 8 ranks; with experts those that share them. At sizes that most layouts divide, with SGD only."""
    model = ModelOptions(num_hidden_layers=8, hidden_size=64, num_attention_heads=8, num_key_value_heads=4, **more)
    job = replace(
        job,
        model=model,
        data=replace(job.data, sequence_length=48),
        optim=OptimOptions(name="sgd"),
        train=replace(job.train, global_batch=8),
    )
    given = [each for each in layouts(8, model.num_experts) if each.world == 8 and not refusal(job, each)]
    only = [str(each) for each in given if not more or each.expert > 1]
    report = check(job, processes=8, only=only, steps=4)
    assert len(report.rows) == len(only) > least
    assert report.ok, [row for row in report.rows if not row.ok]


@pytest.mark.parametrize("processes", [2, 4, 6, 8])
def test_every_layout_of_some_processes_is_named_once(processes):
    found = layouts(processes)
    assert len({str(layout) for layout in found}) == len(found)
    assert all(1 < layout.world <= processes for layout in found)
    axes = ("replicas", "pipeline", "fsdp", "context", "tensor")
    for world in range(2, processes + 1):
        here = {tuple(getattr(layout, axis) for axis in axes) for layout in found if layout.world == world}
        assert len(here) == _products(world, len(axes))
    schedules = {layout.schedule for layout in found if layout.pipeline > 1}
    assert len(schedules) == 7
    assert {layout.context_by for layout in found if layout.context > 1} == {"ring", "ulysses"}
    alone, pair = ["fsdp"], ["replicas", "fsdp"]
    for shared in (alone, ["context"], *([pair, ["context", "tensor"]] if processes >= 4 else [])):
        these = [each for each in found if [axis for axis in axes if getattr(each, axis) > 1] == shared]
        assert {layout.zero for layout in these} == {1, 2, 3}
    assert {layout.tensor_by for layout in found if layout.tensor > 1} == {"gather", "ring"}
    for axis in axes:
        assert any(getattr(layout, axis) > 1 and layout.recompute == "block" for layout in found)


def _products(total: int, count: int) -> int:
    if count == 1:
        return 1
    return sum(_products(total // first, count - 1) for first in range(1, total + 1) if total % first == 0)


def test_the_small_job_keeps_the_structure_and_fits_every_layout_that_the_job_fits():
    model = ModelOptions(
        num_hidden_layers=40, hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=300, attention_bias=True, max_position_embeddings=8192,
    )  # fmt: skip
    job = Job(model=model, data=DataOptions(sequence_length=4096), train=TrainOptions(steps=10, global_batch=64))
    wanted = [layout for layout in layouts(8) if not refusal(job, layout)]
    assert {layout.world for layout in wanted} == {2, 3, 4, 5, 6, 7, 8}
    assert all(layout in wanted for layout in layouts(8) if layout.world in (2, 4, 8))
    reduced = small(job, 8, wanted)
    for name in ("num_attention_heads", "num_key_value_heads", "attention_bias", "tie_word_embeddings", "vocab_size"):
        assert getattr(reduced.model, name) == getattr(model, name)
    assert reduced.model.hidden_size <= 32
    assert reduced.model.num_hidden_layers == 16
    assert not [layout for layout in wanted if refusal(reduced, layout)]


def test_the_command_line_prints_a_table_or_json_and_exits_with_1(job, capsys, monkeypatch):
    source, cache = job.data.source[0], job.data.cache
    words = ["check", "--data", source, "--data.cache", cache, "--data.tokenizer", "bytes", "--data.sequence-length",
             "64", "--train.global-batch", "24", "--check-steps", "6"]  # fmt: skip
    assert main([*words, "--layout", "fsdp=2", "--layout=replicas=2", "--format", "json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["ok"]
    assert found.keys() == {"ok", "rows", "refused"}
    assert [row["layout"] for row in found["rows"]] == ["fsdp=2", "replicas=2"] * 2
    assert found["rows"][0]["ran"].startswith("fsdp=2,zero=3")
    promised = [
        "layout",
        "steps",
        "dtype",
        "max_rel_diff_grad",
        "max_rel_diff_loss",
        "max_rel_diff_weights",
        "bound",
        "ok",
    ]
    more = [
        "optimizer",
        "ran",
        "bound_grad",
        "bound_loss",
        "bound_weights",
        "worst_grad",
        "worst_weights",
        "same_samples",
        "error",
    ]
    for row in found["rows"]:
        assert list(row) == promised + more
        assert max(row[name] for name in promised if name.startswith("max")) <= row["bound"]
        assert set(re.findall(r"^\| `(\w+)` \|", DOCS.read_text(), re.MULTILINE)) == {*promised, *more}
    assert "4 of 4 rows compute the same as one process" in captured.err
    assert "not tried" not in captured.err
    wrong = {**(check.__kwdefaults__ or {}), "entry": "tests.launch.wrong:label"}
    monkeypatch.setattr(check, "__kwdefaults__", wrong)
    assert main([*words, "--layout", "fsdp=2"]) == 1
    out = capsys.readouterr().out
    assert "DIFFERS: gradient of " in out
    assert re.search(r"^not tried: other layouts, .*: docs/check\.md$", out, re.MULTILINE)
    assert main(["check", "--layout"]) == 2
    assert main([*words, "--dtype", "fp8"]) == 2
    assert main([*words, "--processes", "2", "--layout", "tensor=4"]) == 2
    assert Path(source).is_dir()
    assert Layout.parse("fsdp=2").world == 2
