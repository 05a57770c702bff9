"""A model with experts, from its first step to the folder that others read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli.main import main
from shoal.observe import metrics


def written(folder: Path, capsys: pytest.CaptureFixture, *words: str) -> str:
    capsys.readouterr()
    plain = ["--prompt", "the", "--max-tokens", "8", "--temperature", "0", "--format", "json"]
    assert main(["generate", str(folder), *plain, *words]) == 0
    return json.loads(capsys.readouterr().out)["text"]


@pytest.mark.nightly
def test_trained_resumed_written_with_exported_and_imported(arguments, tmp_path, capsys):
    """Steps of one layout, then of another, which share the experts differently."""
    run, model, again = tmp_path / "run", tmp_path / "hf", tmp_path / "again"
    experts = {
        "family": "deepseek_v3", "num-key-value-heads": "4", "num-experts": "4", "num-experts-per-tok": "2",
        "moe-intermediate-size": "24", "shared-expert-intermediate-size": "24", "first-k-dense-replace": "1",
        "kv-lora-rank": "16", "qk-nope-head-dim": "8", "qk-rope-head-dim": "4", "v-head-dim": "12",
        "router-aux-loss-coef": "0.01", "bias-update-rate": "0.01",
    }  # fmt: skip
    words = [word for name, value in experts.items() for word in (f"--model.{name}", value)]
    command = [*arguments, *words, "--layout", "fsdp=2,expert=2", "--steps", "4", "--run-dir", str(run)]
    assert main(command) == 0
    assert main(["train", "--resume", str(run), "--layout", "tensor=2,expert=2", "--steps", "8"]) == 0
    losses = [row["loss"] for row in metrics.read(run)]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    text = written(run, capsys)
    assert main(["ckpt", "export-hf", str(run), str(model)]) == 0
    assert written(model, capsys) == text
    assert main(["ckpt", "import-hf", str(model), str(again)]) == 0
    assert written(again, capsys) == text
    assert written(run, capsys, "--layout", "pipeline=2") == text
