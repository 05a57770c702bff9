"""`shoal simulate --cluster`: what it prints, answers and refuses."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from shoal.cli.flags import docstrings
from shoal.cli.main import main
from shoal.cli.simulate_cluster import SimulateCluster

RECIPE = str(Path(__file__).parents[2] / "recipes" / "quickstart.toml")
LAYOUT = "replicas=2,pipeline=4,tensor=2"
SMALL = ["simulate", "--model", "llama3-8b", "--cluster", "h100x16", "--global-batch", "64", "--steps", "10"]


def answer(capsys: pytest.CaptureFixture, *args: str) -> dict:
    assert main([*args, "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_option_is_explained():
    assert set(docstrings(SimulateCluster)) == {field.name for field in fields(SimulateCluster)}


def test_the_fastest_layout_is_that_of_shoal_plan(capsys: pytest.CaptureFixture):
    found = answer(capsys, *SMALL)
    planned = answer(capsys, "plan", *SMALL[1:-2], "--best", "1")["plans"][0]
    assert (found["layout"], found["predicted_step_seconds"]) == (planned["layout"], planned["step_seconds"])
    assert found["seconds"] == pytest.approx(sum(found["parts_seconds"].values()))


def test_a_slow_device_a_failure_and_files(capsys: pytest.CaptureFixture, tmp_path: Path):
    plain = answer(capsys, *SMALL, "--layout", LAYOUT, "--mtbf", "inf")
    assert plain["mtbf_seconds"] is None
    assert plain["goodput"] == 1
    slow = answer(capsys, *SMALL, "--layout", LAYOUT, "--mtbf", "inf", "--slow", "1:2=1.5")
    # The last rank, with the output layer, was slower than others before.
    assert 1.1 < slow["median_step_seconds"] / plain["median_step_seconds"] < 1.5
    page = tmp_path / "step.html"
    args = [*SMALL, "--layout", LAYOUT, "--mtbf", "0.5", "--restart", "5", "--every", "2", "--timeline", str(page)]
    assert main(args) == 0
    assert "a device fails every 1:52" in (printed := capsys.readouterr().out)
    assert str(page) in printed
    assert "simulated, 1 pipeline of 2" in page.read_text()


def test_asynchronous_workers(capsys: pytest.CaptureFixture):
    server = ["--sync", "server", "--mode", "ssp", "--staleness", "1", "--servers", "8", "--replicas", "4"]
    found = answer(capsys, *SMALL, *server, "--jitter", "0.1", "--steps", "50")
    assert sum(found["staleness"].values()) == 200
    assert found["staleness_max"] <= 3 * 3
    assert sum(found["shares"].values()) == pytest.approx(1)
    waited = answer(capsys, *SMALL, *server[:2], *server[6:], "--jitter", "0.1", "--steps", "50")
    assert waited["parts_seconds"]["stragglers"] > 0


def test_a_job_in_place_of_a_model(capsys: pytest.CaptureFixture):
    found = answer(capsys, "simulate", RECIPE, "--cluster", "h100x2", "--precision", "bf16", "--layout", "fsdp=2")
    assert found["layout"].startswith("fsdp=2")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--slow", "1=2"], "is not PIPELINE:RANK=TIMES"),
        (["--slow", "9:0=2", "--layout", LAYOUT], "there is no rank 0 of pipeline 9"),
        (["--layout", "replicas=3"], "has 3 ranks, and h100x16 has 16 devices"),
        (["--layout", "replicas=0"], "less than 1"),
        (["--steps", "0"], "--steps=0 is less than 1"),
        (["--spread", "-1"], "--spread=-1.0 is less than 0"),
        (["--jitter", "3"], "more than 1"),
        (["--mtbf", "-1"], "--mtbf=-1.0 is less than 0"),
        (["--mtbf", "nan"], "--mtbf=nan"),
        (["--restart", "inf"], "--restart=inf"),
        (["--restart", "1e6", "--mtbf", "1"], "leaves no time"),
        (["--timeline", "step.png"], "no file that can be written"),
        (["--perfetto", "/none/step.json"], "no file that can be written"),
        ([RECIPE], "a job and --model are both given"),
        (["--model", "llama9"], "llama9"),
        (["--sync", "local"], "sync=local is not simulated on a cluster"),
        (["--sync", "server", "--mode", "quorum"], "mode=quorum is not simulated"),
    ],
)
def test_what_cannot_be(capsys: pytest.CaptureFixture, args: list[str], words: str):
    # Of so many steps one failure at least is in them.
    assert main([*SMALL, "--steps", "100000", *args]) == 2
    assert words in capsys.readouterr().err


def test_no_model(capsys: pytest.CaptureFixture):
    assert main(["simulate", "--cluster", "h100x16"]) == 2
    assert "no model is named" in capsys.readouterr().err


@pytest.mark.nightly
def test_sixteen_thousand_devices_that_differ(capsys: pytest.CaptureFixture):
    """A hundred steps, each of another speed on every device."""
    large = ["simulate", "--model", "llama3-405b", "--cluster", "h100x16384", "--spread", "0.02", "--jitter", "0.02"]
    found = answer(capsys, *large)
    assert found["steps"] == 100
    assert found["parts_seconds"]["stragglers"] > 0
