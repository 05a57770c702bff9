"""`shoal check`: right layouts pass, a planted bug does not, and what a job cannot have is refused with its reason."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shoal.cli.main import main
from shoal.errors import JobError
from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.every import layouts, refusal, small
from shoal.job.model import ModelOptions
from shoal.job.train import TrainOptions
from shoal.launch.check import check
from shoal.training.equality import _differences


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


def test_layouts_of_a_job_compute_the_same_and_impossible_ones_are_refused(job):
    rows = []
    only = ["pipeline=2,tensor=2", "replicas=2", "tensor=3"]
    report = check(job, only=only, dtypes=("fp64", "bf16"), steps=6, on_row=rows.append)
    assert not report.ok  # one was asked for by name and cannot be
    assert report.rows == rows
    told = [(row.layout, row.dtype, row.optimizer) for row in rows]
    names = ["pipeline=2,tensor=2,schedule=1f1b", "replicas=2"]
    kinds = [("fp64", "sgd"), ("fp64", "adamw"), ("bf16", "adamw")]
    assert told == [(name, *kind) for kind in kinds for name in names]
    for row in rows:
        assert row.ok, row
        assert row.same_samples
        assert row.max_rel_diff_grad <= row.bound_grad
        assert row.bound_grad == 1e-10 if row.dtype == "fp64" else row.bound_grad >= 2**-8
    assert [(r.layout, "heads" in r.reason) for r in report.refused] == [("tensor=3", True)]


@pytest.mark.parametrize("only", [["pipeline=2,micro_batch=3"], ["fsdp=3"], ["pipeline=2,stages=5+3", "replicas=2"]])
def test_what_the_job_can_have_the_small_one_can_too(job, only):
    report = check(job, only=only, steps=6)
    assert report.ok, report
    assert len(report.rows) == 2 * len(only)


@pytest.mark.parametrize("bug", ["number", "missing", "unequal"])
def test_pieces_that_are_no_numbers_missing_or_unequal_are_infinitely_wrong(tmp_path, bug):
    whole = {"w": torch.arange(8.0).view(4, 2)}
    for where, rows in (("one", [(0, 4)]), ("two", [(0, 2), (1, 4)])):
        (tmp_path / where).mkdir()
        for rank, (start, stop) in enumerate(rows):
            piece = whole["w"][start:stop].clone()
            if where == "two" and rank == 1:
                if bug == "number":
                    piece[2, 1] = torch.nan
                elif bug == "unequal":
                    piece[0, 0] += 1e-6
                elif bug == "missing":
                    piece = piece[:2].clone()
            save_file({f"weight/0/w@{start},0": piece}, tmp_path / where / f"rank-{rank}.safetensors")
    assert _differences(str(tmp_path / "one"), "weight", whole) == {"w": 0.0}
    assert _differences(str(tmp_path / "two"), "weight", whole) == {"w": math.inf}


@pytest.mark.parametrize("bug", ["label", "sample"])
def test_a_planted_bug_is_found_and_named(job, bug):
    report = check(job, only=["fsdp=2"], steps=6, entry=f"tests.launch.wrong:{bug}")
    assert not report.ok
    assert not any(row.ok for row in report.rows)
    assert all(row.same_samples == (bug == "label") for row in report.rows)


def test_a_rank_that_fails_is_a_row_that_says_so(job):
    report = check(job, only=["fsdp=2", "replicas=2"], steps=6, entry="tests.launch.wrong:raises_in_fsdp")
    assert [row.ok for row in report.rows] == [False, True] * 2
    assert "planted" in report.rows[0].error


def test_a_job_that_does_not_learn_proves_nothing(job):
    with pytest.raises(JobError, match="does not learn with sgd"):
        check(job, only=["replicas=2"], steps=2, entry="tests.launch.wrong:learns_nothing")


@pytest.mark.parametrize("processes", [2, 4, 6, 8])
def test_every_layout_of_some_processes_is_named_once(processes):
    found = layouts(processes)
    assert len({str(layout) for layout in found}) == len(found)
    assert all(processes % layout.world == 0 and layout.world > 1 for layout in found)
    axes = ("replicas", "pipeline", "fsdp", "context", "tensor")
    for world in (n for n in range(2, processes + 1) if processes % n == 0):
        here = {tuple(getattr(layout, axis) for axis in axes) for layout in found if layout.world == world}
        assert len(here) == _products(world, len(axes))
    schedules = {layout.schedule for layout in found if layout.pipeline > 1}
    assert len(schedules) == 7
    assert {layout.context_by for layout in found if layout.context > 1} == {"ring", "ulysses"}
    assert {layout.zero for layout in found if layout.fsdp > 1} == {1, 2, 3}


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
    assert len(wanted) == len(layouts(8))
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
    assert [row["layout"] for row in found["rows"]] == ["fsdp=2,zero=3", "replicas=2"] * 2
    keys = {"layout", "steps", "dtype", "max_rel_diff_grad", "max_rel_diff_loss", "max_rel_diff_weights", "bound", "ok"}
    assert all(keys <= row.keys() for row in found["rows"])
    assert "4 of 4 rows compute the same as one process" in captured.err
    wrong = {**(check.__kwdefaults__ or {}), "entry": "tests.launch.wrong:label"}
    monkeypatch.setattr(check, "__kwdefaults__", wrong)
    assert main([*words, "--layout", "fsdp=2"]) == 1
    assert "DIFFERS" in capsys.readouterr().out
    assert main(["check", "--layout"]) == 2
    assert main([*words, "--dtype", "fp8"]) == 2
    assert Path(source).is_dir()
    assert Layout.parse("fsdp=2").world == 2
