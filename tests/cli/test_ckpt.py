"""`shoal ckpt`: what it prints and answers, its exit codes, and a run that was imported."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import contents, convert, manifest, reader
from shoal.cli.ckpt import ExportOptions, ImportOptions, ReshardOptions, ShowOptions, VerifyOptions
from shoal.cli.flags import docstrings
from shoal.cli.main import main
from shoal.data import tokenizer as tokenizers
from shoal.errors import CheckpointError
from shoal.job import read, read_run
from shoal.launch.train import ready
from shoal.models.storage import canonical
from shoal.observe import metrics
from shoal.serving.load import load
from shoal.shard import Shard
from tests.checkpoint.test_convert import run_of
from tests.models import tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return run_of(tmp_path_factory.mktemp("run") / "run", replace(tiny.BASE, vocab_size=260))


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    convert.export_hf(contents.find(run), folder)
    return folder


def answer(args: list[str], capsys: pytest.CaptureFixture, code: int = 0) -> dict[str, Any]:
    """What `--format json` prints, all else being on standard error."""
    assert main(["ckpt", *args, "--format", "json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.mark.parametrize("options", [ShowOptions, VerifyOptions, ReshardOptions, ExportOptions, ImportOptions])
def test_every_option_is_explained(options: type):
    assert set(docstrings(options)) == set(options.__dataclass_fields__)


@pytest.mark.parametrize("verb", ["show", "verify", "reshard", "export-hf", "import-hf"])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        main(["ckpt", verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: shoal ckpt {verb}" in capsys.readouterr().out


def test_show_says_what_there_is(run: Path, capsys: pytest.CaptureFixture):
    assert main(["ckpt", "show", str(run)]) == 0
    out = capsys.readouterr().out
    for said in (
        "step-00000007", "saved by layout replicas=2", "model       30 tensors", "exp_avg_sq  30 tensors",
        "rank-00001.safetensors", "in 2 files",
    ):  # fmt: skip
        assert said in out
    assert "q_proj" not in out
    assert main(["ckpt", "show", str(run / "checkpoints" / "step-00000007"), "--tensors", "true"]) == 0
    out = capsys.readouterr().out
    assert "exp_avg.model.layers.2.self_attn.q_proj.weight" in out
    assert "[260, 32]  33,280 bytes  2 pieces" in out


def test_show_as_json(run: Path, capsys: pytest.CaptureFixture):
    facts = answer(["show", str(run)], capsys)
    saved = contents.find(run)
    model = {name: tensor for name, tensor in facts["tensors"].items() if not name.startswith("exp_avg")}
    expected = dict(canonical(load(run)))
    assert {name: tensor["shape"] for name, tensor in model.items()} == {n: list(p.shape) for n, p in expected.items()}
    assert facts["kinds"]["model"]["elements"] == sum(p.numel() for p in expected.values())
    assert facts["kinds"]["exp_avg"]["bytes"] == sum(p.nbytes for p in expected.values())
    assert facts["bytes"] == sum(file.stat().st_size for file in saved.iterdir())
    assert (facts["step"], facts["layout"], facts["values"]["position"]) == (7, "replicas=2", 70)
    assert set(facts["files"]) == {"rank-00000.safetensors", "rank-00001.safetensors"}


def test_verify_finds_each_damaged_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["ckpt", "verify", str(run)]) == 0
    assert "every bit of 2 files is as it was saved" in capsys.readouterr().out
    assert answer(["verify", str(run)], capsys)["damaged"] == []
    copy = shutil.copytree(run, tmp_path / "copy")
    files = sorted(contents.find(copy).glob("*.safetensors"))
    content = bytearray(files[0].read_bytes())
    content[-5] ^= 4
    files[0].write_bytes(content)
    files[1].unlink()
    assert main(["ckpt", "verify", str(contents.find(copy))]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{files[0]} is damaged: it does not match its checksum",
        f"{files[1]} is missing",
    ]
    damaged = answer(["verify", str(copy)], capsys, code=1)["damaged"]
    assert [entry["file"] for entry in damaged] == list(map(str, files))
    (contents.find(copy) / "manifest.json").unlink()
    assert main(["ckpt", "verify", str(contents.find(copy))]) == 1
    assert "manifest.json is missing" in capsys.readouterr().out


def test_what_is_damaged_is_not_converted(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Of a run, the newest undamaged checkpoint; none, if it was named itself."""
    copy = shutil.copytree(run, tmp_path / "copy")
    newer = shutil.copytree(contents.find(copy), copy / "checkpoints" / "step-00000008")
    (newer / "rank-00001.safetensors").write_bytes(b"")
    for verb in ("reshard", "export-hf"):
        assert main(["ckpt", verb, str(newer), str(tmp_path / "out")]) == 2
        assert "rank-00001.safetensors: is damaged" in capsys.readouterr().err
        assert main(["ckpt", verb, str(copy), str(tmp_path / verb)]) == 0
        assert "checkpoint step-00000008 is passed over" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert manifest.read(tmp_path / "reshard").step == 7


def test_a_run_goes_on_from_its_resharded_checkpoint(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    copy = shutil.copytree(run, tmp_path / "copy")
    out = copy / "checkpoints" / "step-00000007-1"
    assert len(answer(["reshard", str(copy), str(out), "--pieces", "3"], capsys)["files"]) == 3
    assert checkpoint.newest(copy / "checkpoints", pytest.fail) == out
    for ours, theirs in zip(load(run).parameters(), load(copy).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_export_answers_with_its_folder(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "model"
    facts = answer(["export-hf", str(run), str(out), "--dtype", "bf16", "--file-gib", "0.00005"], capsys)
    assert facts == {"checkpoint": str(contents.find(run)), "model": str(out)}
    assert len(list(out.glob("*.safetensors"))) > 1
    assert torch.equal(load(out).model.norm.weight, load(run).model.norm.weight.bfloat16().float())


@pytest.mark.parametrize(
    ("args", "what", "fix"),
    [
        (["shwo", "x"], "unknown verb 'ckpt shwo'", "'show'"),
        (["show"], "no path is named", "shoal ckpt show PATH;"),
        (["reshard", "x"], "no OUT folder is named", "shoal ckpt reshard PATH OUT"),
        (["import-hf", "x"], "no OUT folder is named", "shoal ckpt import-hf FOLDER OUT"),
        (["show", "no/such"], "no/such: there is no such folder", "RUN/checkpoints/step-00000100"),
        (["verify", "{tmp}"], "there is no checkpoint in it", "give a run folder"),
        (["export-hf", "{run}", "{tmp}"], "is there already", "name another folder"),
        (["export-hf", "{run}", "out", "--dtype", "fp8"], "--dtype='fp8' is unknown", "'fp32'"),
        (["export-hf", "{run}", "out", "--file-gib", "0"], "--file-gib=0.0 is not positive", "5"),
        (["reshard", "{run}", "out", "--pieces", "-1"], "--pieces=-1 is less than 0", "8"),
        (["reshard", "{run}", "out", "--piece", "1"], "unknown option --piece", "--pieces"),
        (["import-hf", "{run}", "out"], "config.json: there is no such file", "Hugging Face"),
        (["import-hf", "{folder}", "out", "--recipe", "no.toml"], "no.toml: cannot read the recipe", "TOML"),
    ],
)
def test_mistakes(args, what, fix, run: Path, exported: Path, tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["ckpt", *(word.format(run=run, tmp=tmp_path / "made", folder=exported) for word in args)]) == 2
    err = capsys.readouterr().err
    assert what in err
    assert fix in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_imported_model_writes(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out = tmp_path / "run"
    assert main(["ckpt", "import-hf", str(exported), str(out)]) == 0
    assert f"next: shoal generate {out} --prompt" in capsys.readouterr().out
    words = ["--prompt", "ab", "--max-tokens", "8", "--temperature", "0", "--format", "json"]
    assert main(["generate", str(out), *words]) == 0
    ours = json.loads(capsys.readouterr().out)["text"]
    assert main(["generate", str(exported), *words]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == ours


RECIPE = """
layout = "replicas=2"
[data]
source = ["{text}"]
cache = "{cache}"
sequence_length = 64
workers = 1
[train]
steps = 3
global_batch = 4
precision = "fp32"
compile = "off"
[run]
threads = 1
"""


def test_an_imported_run_trains_as_one_that_began_from_the_folder(exported, tmp_path, ranks, capsys):
    """The same losses, bit by bit, though the folder is gone meanwhile."""
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(400)))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(text=tmp_path / "text.txt", cache=tmp_path / "cache"))
    folder = shutil.copytree(exported, tmp_path / "folder")

    def train(job, run: Path, resume: bool) -> list[float]:
        job, arguments = ready(job.validate(), run if resume else None, time.time())
        ranks.run("shoal.training.worker:main", 2, **arguments)
        return [row["loss"] for row in metrics.read(run)]

    direct = read(recipe)
    direct = replace(
        direct,
        model=replace(direct.model, weights=str(folder)),
        run=replace(direct.run, dir=str(tmp_path / "direct")),
    )
    expected = train(direct, tmp_path / "direct", resume=False)
    out = tmp_path / "run"
    assert main(["ckpt", "import-hf", str(folder), str(out), "--recipe", str(recipe)]) == 0
    assert f"next: shoal train --resume {out}" in capsys.readouterr().out
    shutil.rmtree(folder)
    assert train(read_run(out), out, resume=True) == expected
    assert len(expected) == 3
    assert contents.find(out).name == "step-00000003"
    assert tokenizers.load(out).end == 256


def test_only_state_from_before_the_first_update_may_be_missing(exported, tmp_path, monkeypatch):
    convert.import_hf(exported, tmp_path / "run")
    saved = contents.find(tmp_path / "run")
    state = Shard("exp_avg.model.norm.weight", (32,), (0,), torch.zeros(32))
    checkpoint.load(saved, [state])
    assert not state.local.any()
    with pytest.raises(CheckpointError, match=r"'exp_avg\.other' is missing"):
        checkpoint.load(saved, [Shard("exp_avg.other", (32,), (0,), torch.zeros(32))])
    trained = replace_values(manifest.read(saved), updates=1)
    monkeypatch.setattr(reader.manifest, "read", lambda folder: trained)
    with pytest.raises(CheckpointError, match=r"'exp_avg\.model\.norm\.weight' is missing"):
        checkpoint.load(saved, [state], verified=True)


def replace_values(what: manifest.Manifest, updates: int) -> manifest.Manifest:
    values = what.values | {"update": {"updates": updates}}
    return manifest.Manifest(step=what.step, values=values, files=what.files, tensors=what.tensors)
