"""NaN or inf in loss or gradient: no rank applies the update; the run stops and says where, or goes on."""

from __future__ import annotations

import math

import pytest

from shoal import checkpoint
from shoal.cli.main import main
from shoal.observe import metrics

CASE = "tests.training.cases:nonfinite"


@pytest.mark.parametrize("layout", ["replicas=3", "fsdp=2,zero=3", "fsdp=2,zero=1"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stop_leaves_every_rank_as_it_was_and_names_the_step(train, tiny, tmp_path, layout, what):
    job = tiny(tmp_path / "run", layout, train={"steps": 6}, checkpoint={"every": 2})
    for result in train(job, entry=CASE, what=what, at=4, victim=1):
        digests = result["digests"]
        assert len(digests) == 1 + 4, "nothing after the step"
        assert len(set(digests[:4])) == 4, "the steps before change all weights"
        assert digests[4] == digests[3]
        assert result["error"]["where"] == "step 4"
        assert "the update was not applied" in result["error"]["what"]
        assert "optim.lr (now " in result["error"]["fix"]
    newest = checkpoint.newest(tmp_path / "run/checkpoints", pytest.fail)
    assert newest is not None
    assert newest.name == "step-00000002"


@pytest.mark.parametrize(("layout", "what"), [("replicas=3", "gradient"), ("fsdp=2,zero=2,micro_batch=3", "loss")])
def test_skip_goes_on_with_finite_steps(train, tiny, tmp_path, layout, what):
    job = tiny(tmp_path / "run", layout, train={"steps": 6, "on_nonfinite": "skip"})
    for result in train(job, entry=CASE, what=what, at=4, victim=0):
        assert result["error"] is None
        digests = result["digests"]
        assert digests[4] == digests[3]
        assert len(set(digests)) == 6
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        fine = all(isinstance(row[name], float) and math.isfinite(row[name]) for name in ("loss", "grad_norm"))
        assert fine == (row["step"] != 4)
    assert "warning: step 4: loss or gradient is not finite" in (tmp_path / "run/log.txt").read_text()


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
