"""A model from a run folder: its newest whole checkpoint, one checkpoint, or the export of a finished run."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch

from shoal import Job, job
from shoal.checkpoint import Saver, huggingface
from shoal.errors import ModelError
from shoal.models.decoder import Decoder
from shoal.models.storage import canonical
from shoal.serving.generate import generate
from shoal.serving.load import load
from shoal.shard import Shard, State
from tests.models import tiny


def state(model: Decoder) -> State:
    shards = [Shard(n, tuple(p.shape), (0,) * p.ndim, p) for n, p in canonical(model)]
    moments = [replace(s, name=f"exp_avg.{s.name}", local=torch.zeros_like(s.local)) for s in shards]
    return State([*shards, *moments], {})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, of models with seeds 1 and 2."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "job.toml").write_text(job.write(Job(model=tiny.CASES["tied"])))
    with Saver(folder / "checkpoints", 0, 1, 2, nonce="test") as saver:
        for step in (1, 2):
            pending = saver.save(state(tiny.decoder(tiny.CASES["tied"], seed=step)), step)
            pending.wait()
            assert pending.error is None
    return folder


def same(model: Decoder, seed: int) -> bool:
    tokens_BL = tiny.tokens(2, 7)
    return not model.training and torch.equal(model(tokens_BL), tiny.decoder(tiny.CASES["tied"], seed=seed)(tokens_BL))


def test_newest_checkpoint(run: Path) -> None:
    assert same(load(run), 2)
    assert same(load(str(run)), 2)


def test_one_checkpoint(run: Path) -> None:
    assert same(load(run / "checkpoints" / "step-00000001"), 1)


def test_text_from_one_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tokenizer of its run, wherever one stands."""
    copy = shutil.copytree(run, tmp_path / "run")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"{i} ": i for i in range(66)}, unk_token="0 "))
    words.add_special_tokens(["</s>"])
    words.save(str(copy / "tokenizer.json"))
    monkeypatch.chdir(copy / "checkpoints")
    for step in ("step-00000001", copy / "checkpoints" / "step-00000001"):
        assert generate(step, "7 ", seed=1, max_tokens=9) == generate(
            load(step), "7 ", tokenizer=copy, seed=1, max_tokens=9
        )
    with pytest.raises(ModelError, match="no run and no model"):
        generate(copy / "checkpoints", "7 ")


def test_damaged_checkpoint_is_passed_over_and_named(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for file in (copy / "checkpoints" / "step-00000002").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    said: list[str] = []
    assert same(load(copy, said.append), 1)
    assert "step-00000002" in said[0]


def test_export_where_checkpoints_are_gone(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ModelError, match="no checkpoint"):
        load(copy)
    model = tiny.decoder(tiny.CASES["tied"], seed=3)
    huggingface.export(model.options, canonical(model), copy / "model")
    assert same(load(copy), 3)
