"""What a run leaves for people, scripts and other programs."""

from __future__ import annotations

import json
import math
import statistics
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import shoal
from shoal import checkpoint, device
from shoal.cli.main import main
from shoal.job import read as read_job
from shoal.models.storage import canonical
from shoal.observe import metrics
from shoal.planning import entry, local
from tests.planning.test_local import machine, precision

LINE = {
    "run", "steps", "tokens", "loss_first", "loss_last", "val_loss", "bits_per_byte", "tokens_per_second", "mfu",
    "seconds",
}  # fmt: skip
ROW = {
    "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_second", "seconds", "mfu", "memory_gib", "data_s",
    "forward_s", "backward_s", "communication_s", "optimizer_s", "sent_bytes", "received_bytes",
}  # fmt: skip
FILES = {
    "job.toml", "metrics.jsonl", "log.txt", "environment.json", "result.json", "report.html", "checkpoints", "model",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(ranks, tiny, tmp_path_factory):
    """A finished run of two ranks that share a model."""
    run = tmp_path_factory.mktemp("runs") / "run"
    job = tiny(run, "fsdp=2,zero=3", train={"steps": 6, "validate_every": 3})
    _, arguments = shoal.launch.train.ready(job, None, time.time())
    figures = ranks.run("shoal.training.worker:main", 2, **arguments)[0]
    where = {name: arguments[name] for name in ("folder", "prepared")}
    ranks.run("shoal.launch.finish:main", 1, **where, figures=figures)
    return run


def test_json_is_the_last_line_and_says_what_the_run_came_to(arguments, tmp_path, capfd, monkeypatch):
    run = tmp_path / "run"
    # A machine that has been calibrated.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = replace(machine(precision()), device=device.name(torch.device("cpu")))
    entry.home().parent.mkdir()
    entry.home().write_text(entry.write(here), encoding="utf-8")
    words = ["--layout", "replicas=2", "--steps", "6", "--format", "json", "--run-dir", str(run)]
    before = time.time()
    assert main([*arguments, *words]) == 0
    passed = time.time() - before
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    told = json.loads(out)
    assert set(told) == LINE
    rows = metrics.read(run)
    assert told["run"] == str(run)
    assert told["steps"] == 6
    assert told["tokens"] == sum(row["tokens"] for row in rows) <= 6 * 12 * 64
    assert (told["loss_first"], told["loss_last"]) == (rows[0]["loss"], rows[-1]["loss"])
    assert told["val_loss"] == rows[-1]["val_loss"] < told["loss_first"]
    # One token a byte, and one more at the end of each document, of a few hundred bytes.
    assert told["bits_per_byte"] == pytest.approx(told["val_loss"] / math.log(2), rel=0.02)
    assert told["tokens_per_second"] == pytest.approx(told["tokens"] / sum(row["seconds"] for row in rows))
    assert 0 < told["mfu"] < 1
    assert sum(row["seconds"] for row in rows) < told["seconds"] < passed
    assert "gzip -9" in err
    assert "shoal train --resume" in err
    kept = json.loads((run / "result.json").read_text())
    assert kept.items() >= told.items()
    assert kept["predicted_step_seconds"] == pytest.approx(local.predict(read_job(run / "job.toml"), here).seconds)
    assert kept["step_seconds"] == pytest.approx(statistics.median(row["seconds"] for row in rows[2:]))
    assert kept["memory_gib"] == max(row["memory_gib"] for row in rows)
    assert "predicted, by what `shoal calibrate` measured" in err
    assert "were predicted" in err
    assert "step, predicted" in (run / "report.html").read_text()


def test_the_run_folder_is_complete(trained):
    assert not FILES - {path.name for path in trained.iterdir()}
    assert not {"config.json", "model.safetensors", "tokenizer.json"} - {p.name for p in (trained / "model").iterdir()}
    assert not checkpoint.verify(trained / "checkpoints/step-00000006")
    rows = metrics.read(trained)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert not ROW - set(row)
        parts = sum(row[f"{part}_s"] for part in ("data", "forward", "backward", "communication", "optimizer"))
        assert parts == pytest.approx(row["seconds"])
        assert ("val_loss" in row) == (row["step"] in (3, 6))


def test_load_gives_a_module_with_the_trained_weights(trained):
    model = shoal.load(trained)
    assert isinstance(model, torch.nn.Module)
    saved = dict(checkpoint.tensors(trained / "checkpoints/step-00000006"))
    named = dict(canonical(model))
    assert set(named) == set(saved)
    assert all(torch.equal(named[name], tensor) for name, tensor in saved.items())
    input_ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert model(input_ids).shape == (2, 20, 257)
        assert torch.equal(model(input_ids), shoal.load(trained / "model")(input_ids))


def test_transformers_reads_the_model(trained):
    theirs = AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    text = "the small fish swims"
    input_ids = tokenizer(text, return_tensors="pt").input_ids
    assert input_ids[0].tolist() == [256, *text.encode()], "every document begins with 256"
    with torch.no_grad():
        torch.testing.assert_close(shoal.load(trained)(input_ids), theirs(input_ids).logits, rtol=1e-5, atol=1e-5)
