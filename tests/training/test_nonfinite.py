"""NaN or inf in loss or gradient: no rank applies the update; the run stops and says where, or goes on."""

from __future__ import annotations

import json
import math

import pytest

from shoal import checkpoint
from shoal.cli.main import main
from shoal.observe import metrics
from shoal.optim.schedule import learning_rate

CASE = "tests.training.cases:nonfinite"


@pytest.mark.parametrize("layout", ["replicas=3", "fsdp=2,zero=3", "fsdp=2,zero=1"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stop_leaves_every_rank_as_it_was_and_names_the_step(train, tiny, tmp_path, layout, what):
    job = tiny(tmp_path / "run", layout, train={"steps": 6}, checkpoint={"every": 2})
    for result in train(job, entry=CASE, what=what, at=[4], victim=1):
        digests = result["digests"]
        assert len(digests) == 1 + 4, "nothing after the step"
        assert len(set(digests[:4])) == 4, "the steps before change all weights"
        assert digests[4] == digests[3]
        assert result["error"]["where"] == "step 4"
        assert "the update was not applied" in result["error"]["what"]
        assert ("; loss of rank 1)" in result["error"]["what"]) == (what == "loss")
        assert "optim.lr (now " in result["error"]["fix"]
    newest = checkpoint.newest(tmp_path / "run/checkpoints", pytest.fail)
    assert newest is not None
    assert newest.name == "step-00000002"


@pytest.mark.parametrize("layout", ["replicas=3", "tensor=2", "pipeline=2,micro_batch=3"])
def test_a_rank_with_ruined_weights_is_named(train, tiny, tmp_path, layout):
    job = tiny(tmp_path / "run", layout, train={"steps": 4})
    for result in train(job, entry=CASE, what="weights", at=[3], victim=1):
        assert result["error"]["where"] == "step 3"
        assert "; weights of rank 1)" in result["error"]["what"]


@pytest.mark.parametrize(("layout", "what"), [("replicas=3", "gradient"), ("fsdp=2,zero=2,micro_batch=3", "loss")])
def test_skip_goes_on_with_finite_steps(train, tiny, tmp_path, layout, what):
    job = tiny(tmp_path / "run", layout, train={"steps": 6, "on_nonfinite": "skip"})
    for result in train(job, entry=CASE, what=what, at=[4], victim=0):
        assert result["error"] is None
        digests = result["digests"]
        assert digests[4] == digests[3]
        assert len(set(digests)) == 6
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # The run is one step further though its weights are not.
    assert [row["lr"] for row in rows if row["step"] != 4] == [learning_rate(job.optim, s, 6) for s in (0, 1, 2, 4, 5)]
    for row in rows:
        fine = all(isinstance(row[name], float) and math.isfinite(row[name]) for name in ("loss", "grad_norm"))
        assert fine == (row["step"] != 4)
    assert "warning: step 4: loss or gradient is not finite" in (tmp_path / "run/log.txt").read_text()


def test_ten_in_a_row_end_the_run_whatever_it_skips(train, tiny, tmp_path):
    job = tiny(tmp_path / "ends", "replicas=2", train={"steps": 30, "on_nonfinite": "skip"})
    for result in train(job, entry=CASE, what="loss", at=list(range(3, 31)), victim=1):
        assert result["error"]["where"] == "step 12"
        assert "10 times in a row" in result["error"]["what"]
    job = tiny(tmp_path / "goes_on", "replicas=2", train={"steps": 22, "on_nonfinite": "skip"})
    nine_twice = [*range(3, 12), *range(13, 22)]
    for result in train(job, entry=CASE, what="loss", at=nine_twice, victim=1):
        assert result["error"] is None
    assert len(metrics.read(tmp_path / "goes_on")) == 22


def test_weights_that_the_last_update_ruined_have_no_sample_and_the_run_its_result(arguments, tmp_path, capfd):
    """Its step was finite, and no later one could notice."""
    run = tmp_path / "run"
    words = ["--layout", "replicas=2", "--steps", "1", "--optim.lr", "1e14", "--optim.warmup", "0"]
    assert main([*arguments, *words, "--optim.schedule", "constant", "--run-dir", str(run), "--format", "json"]) == 0
    out, err = capfd.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert (told["steps"], told["val_loss"]) == (1, None)
    assert "warning: there is no sample: the model's logits are not finite" in err
    assert "Traceback" not in err
    assert main(["generate", str(run), "--prompt", "a"]) == 2
    assert "logits are not finite" in capfd.readouterr().err


def test_absurd_learning_rate_ends_the_run_with_exit_code_1(arguments, tmp_path, capfd):
    run = tmp_path / "run"
    words = ["--layout", "replicas=2", "--steps", "20", "--optim.lr", "1e38", "--optim.warmup", "0"]
    assert main([*arguments, *words, "--run-dir", str(run)]) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    last = [line for line in error.splitlines() if line.strip()][-2:]
    step = len(metrics.read(run))  # with the step that failed
    assert f"step {step}: loss or gradient is not finite" in last[0]
    assert "lower optim.lr (now " in last[1]
    page = (run / "report.html").read_text()
    assert ", failed ·" in page
    assert "loss or gradient is not finite" in page
