"""`shoal plan`: what it prints, answers, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest

from shoal.cli.flags import docstrings
from shoal.cli.main import main
from shoal.cli.plan import PlanOptions
from shoal.job import Layout, read
from shoal.job.fits import check_model
from shoal.planning import answered, unfit
from tests.planning import plans

RECIPE = str(Path(__file__).parents[2] / "recipes" / "quickstart.toml")
SMALL = ["plan", "--model", "llama3-8b", "--cluster", "h100x16"]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch):
    """A search of two layouts."""
    monkeypatch.setattr(answered, "search", plans.search)
    monkeypatch.setattr(unfit, "search", plans.search)


def answer(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out)


def test_every_option_is_explained():
    assert set(docstrings(PlanOptions)) == {field.name for field in fields(PlanOptions)}


def test_the_search_is_asked_and_its_plans_can_be_had(capsys: pytest.CaptureFixture):
    assert main([*SMALL, "--best", "3", "--format", "json"]) == 0
    found = answer(capsys)["plans"]
    assert len(found) == 3
    seconds = [p["step_seconds"] for p in found]
    assert all(after > before / 1.0051 for before, after in pairwise(seconds))  # less apart is equal
    for plan in found:
        layout = Layout.parse(plan["layout"])
        assert (layout.world, layout.micro_batch, layout.recompute) == (16, plan["micro_batch"], plan["recompute"])
        assert sum(plan["parts_seconds"].values()) == pytest.approx(plan["step_seconds"])
        assert sum(plan["parts_gib"].values()) == pytest.approx(plan["memory_gib"])
        assert plan["memory_gib"] * 1.1 <= plan["capacity_gib"]
        assert plan["tokens_per_second_per_device"] * 16 * plan["step_seconds"] == pytest.approx(2**22)


def test_layouts_that_differ_in_little_are_shown_on_demand(capsys: pytest.CaptureFixture):
    def kinds(*more: str) -> list[Layout]:
        assert main([*SMALL, "--best", "6", "--format", "json", *more]) == 0
        layouts = [Layout.parse(plan["layout"]) for plan in answer(capsys)["plans"]]
        return [replace(one, micro_batch=0, schedule="1f1b", stages="") for one in layouts]

    few, all_ = kinds(), kinds("--alike")
    assert few[0] == all_[0]
    assert len(set(few)) == len(few) == 6
    assert len(set(all_)) < len(all_) == 6
    assert kinds("--alike", "False") == few


def test_no_torch_is_imported():
    code = f"""
import sys
from shoal.cli.main import main
main({[*SMALL, "--best", "1", "--explain", "1"]})
sys.exit('torch' in sys.modules)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "What limits it" in ended.stdout


def test_the_text(plain, capsys: pytest.CaptureFixture):
    assert main(SMALL) == 0
    out = capsys.readouterr().out
    assert out.startswith("llama3-8b: 8.03 B parameters, on h100x16: 16 ")
    assert "512 sequences × 8,192 tokens = 4.19 M tokens, bf16" in out
    assert "a step\n" not in out
    for args, number in ((["--explain"], 1), (["--explain", "--best", "2"], 1), (["--explain=2"], 2)):
        assert main([*SMALL, *args]) == 0
        assert capsys.readouterr().out.count("memory of the fullest device") == number


def test_another_cluster_is_planned_beside(plain, capsys: pytest.CaptureFixture):
    args = [*SMALL, "--what-if", "devices=2x,network=0.5x"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "on h100x16 with devices=2x, network=0.5x: 32 " in out
    assert "times the tokens/s" in out.splitlines()[-1]
    assert main([*args, "--format", "json"]) == 0
    found = answer(capsys)
    assert Layout.parse(found["plans"][0]["layout"]).world == 16
    assert Layout.parse(found["what_if"]["plans"][0]["layout"]).world == 32


def test_a_job_is_planned_and_its_layout_written(plain, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "job.toml"
    file.write_text(Path(RECIPE).read_text())
    assert main(["plan", str(file), "--cluster", "h100x8", "--out", str(file), "--format", "json"]) == 0
    first = answer(capsys)["plans"][0]
    assert read(file).layout == Layout.parse(first["layout"])
    check_model(read(file).model, 64, read(file).layout)
    # gpt3's job cannot be trained, and is planned all the same.
    new = str(tmp_path / "new.toml")
    assert main(["plan", "--model", "gpt3-175b", "--cluster", "h100x64", "--out", new]) == 2
    assert "cannot train it" in capsys.readouterr().err
    assert not Path(new).exists()


def test_another_sync_is_planned_and_written(tmp_path: Path, capsys: pytest.CaptureFixture):
    new = str(tmp_path / "new.toml")
    args = [*SMALL, "--sync", "local", "--every", "500", "--codec", "bf16", "--replicas", "2", "--best", "2"]
    assert main([*args, "--out", new, "--format", "json"]) == 0
    plans = answer(capsys)["plans"]
    assert {Layout.parse(plan["layout"]).replicas for plan in plans} == {2}
    assert all(plan["parts_seconds"]["sync"] > 0 and plan["parts_gib"]["sync"] > 0 for plan in plans)
    written = read(new)
    assert (written.sync.name, written.sync.every, written.sync.codec) == ("local", 500, "bf16")
    written.validate()
    # A job that has another one is left alone.
    assert main([*SMALL, "--replicas", "2", "--best", "1", "--out", new]) == 2
    assert "sync.name is local there, and the plan is for allreduce" in capsys.readouterr().err
    assert read(new) == written


def test_layouts_that_the_job_refuses_are_not_shown(plain, tmp_path: Path, capsys: pytest.CaptureFixture):
    """It says a pace for each of eight replicas."""
    file = tmp_path / "job.toml"
    file.write_text(Path(RECIPE).read_text() + '\n[sync]\nname = "local"\nevery = 4\npace = "1+1+1+1+1+1+1+2"\n')
    assert main(["plan", str(file), "--cluster", "h100x8", "--format", "json"]) == 0
    assert [p["layout"] for p in answer(capsys)["plans"]] == ["replicas=8"]


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--cluster", "h100x8"], "no model is named"),
        (["--model", "llama3-8b"], "no cluster is named"),
        (["llama3-8b", "--cluster", "h100x8"], "a model is named by --model llama3-8b"),
        ([*SMALL[1:], "--what-if", "devices=2x", "network=0.5x"], "several changes have commas between them"),
        ([RECIPE, "--model", "gpt2", "--cluster", "h100x8"], "a job and --model are both given"),
        (["--model", "lama3-8b", "--cluster", "h100x8"], "llama3-8b"),
        (["--model", "no/such/config.json", "--cluster", "h100x8"], "no/such/config.json"),
        (["--model", "gpt2", "--cluster", "h10x8"], "one of h100"),
        (["--model", "gpt2", "--cluster", "h100"], "does not say how many"),
        (["--model", "gpt2", "--cluster", "h100x0"], "is less than 1"),
        (["--model", "gpt2", "--cluster", "no/such.toml"], "cannot read the cluster"),
        (["--model", "gpt2", "--cluster", "h100x8", "--best", "0"], "--best=0 is less than 1"),
        (["--model", "gpt2", "--cluster", "h100x8", "--sequence", "-5"], "--sequence=-5 is less than 0"),
        (["--model", "gpt2", "--cluster", "h100x8", "--price", "-2"], "--price=-2.0 is less than 0"),
        (["--model", "gpt2", "--cluster", "h100x8", "--every", "500"], "sync.every=500 has no effect"),
        (["--model", "gpt2", "--cluster", "h100x8", "--codec", "powersgd:2"], "how long its products take"),
        (["--model", "gpt2", "--cluster", "h100x8", "--replicas", "5"], "does not divide the 8 devices"),
        (["--model", "gpt2", "--cluster", "h100x8", "--restart", "-2"], "--restart=-2.0 is less than 0"),
        (["--model", "gpt2", "--cluster", "h100x8", "--storage", "0"], "--storage=0"),
        (["--model", "gpt2", "--cluster", "h100x8", "--tokens", "lots"], "--tokens=lots is no number of tokens"),
        (["--model", "gpt2", "--cluster", "h100x8", "--out", "job.json"], "the job is to be a TOML file"),
        (["--model", "gpt2", "--cluster", "h100x8", "--what-if", "device=h20x"], "--what-if device=h20x: no device"),
        (["--model", "llama3-405b", "--cluster", "h100x8"], "would do, the smallest of the clusters tried"),
    ],
)
def test_mistakes(args: list[str], what: str, plain, capsys: pytest.CaptureFixture):
    assert main(["plan", *args]) == 2
    err = capsys.readouterr().err
    assert what in err
    assert "→" in err
    assert "Traceback" not in err


def test_a_cluster_file_is_blamed_by_line(plain, tmp_path: Path, capsys: pytest.CaptureFixture):
    file = tmp_path / "mine.toml"
    file.write_text('[pool.a]\ndevice = "h100"\ncount = 64\nper_node = 128\n')
    assert main(["plan", "--model", "gpt2", "--cluster", str(file)]) == 2
    assert f"{file}:4: pool.a.per_node=128" in capsys.readouterr().err
