"""What is `auto` in a job becomes a value in the run's job.toml, which then reproduces the run."""

from __future__ import annotations

from shoal.cli.main import main
from shoal.job import read
from shoal.observe import metrics


def test_every_auto_is_resolved_and_the_job_reproduces_the_run(train, tiny, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    auto = {"precision": "auto", "compile": "auto", "steps": 0, "minutes": 0.2}
    seconds = train(tiny(first, train=auto))[0]["seconds"]
    job = read(first / "job.toml")
    assert '"auto"' not in (first / "job.toml").read_text()
    assert job.train.precision in ("fp32", "bf16")
    assert job.train.compile in ("on", "off")
    assert job.train.steps == metrics.read(first)[-1]["step"] > 1
    assert job.model.vocab_size == 257
    assert job.train.validate_every == max(1, job.train.steps // 10)
    assert job.checkpoint.every == max(1, job.train.steps // 5)
    log = (first / "log.txt").read_text()
    for decided in (f"precision {job.train.precision}:", f"compile {job.train.compile}:", "steps that fit into"):
        assert decided in log
    # 12 seconds were asked for; a busy machine may take longer.
    assert seconds < 12 + 30

    assert main(["train", str(first / "job.toml"), "--run-dir", str(second)]) == 0
    again = read(second / "job.toml")
    assert again == job
    assert [row["loss"] for row in metrics.read(second)] == [row["loss"] for row in metrics.read(first)]
