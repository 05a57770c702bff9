"""Hugging Face folders: read by slices from what transformers saved, and read by transformers once saved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from shoal.checkpoint import huggingface
from shoal.errors import ModelError
from shoal.models import build, config
from shoal.models.decoder import Decoder
from shoal.models.storage import canonical
from shoal.shard import Shard
from tests.models import tiny


def shards(model: Decoder) -> list[Shard]:
    return [Shard(n, tuple(p.shape), (0,) * p.ndim, p) for n, p in canonical(model)]


def export(model: Decoder, folder: Path, **options) -> None:
    huggingface.export(model.options, canonical(model), folder, **options)


def reload(folder: Path) -> Decoder:
    model = build(config.read(folder))
    huggingface.load(folder, shards(model))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By transformers, in several files."""
    folder = tmp_path_factory.mktemp("saved")
    twin = tiny.transformers_twin(tiny.decoder(tiny.CASES["biases"]))
    twin.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.mark.parametrize("case", ["llama", "tied", "wide_heads", "biases", "llama3"])
def test_loads_what_transformers_saves(case: str, tmp_path: Path) -> None:
    model = tiny.decoder(tiny.CASES[case])
    tiny.transformers_twin(model).save_pretrained(tmp_path)
    assert torch.equal(reload(tmp_path)(tiny.tokens(2, 9)), model(tiny.tokens(2, 9)))


@pytest.mark.parametrize("case", ["llama", "tied", "wide_heads", "biases", "llama3"])
@pytest.mark.parametrize("file_bytes", [1 << 30, 20_000])
def test_transformers_loads_what_shoal_saves(case: str, file_bytes: int, tmp_path: Path) -> None:
    model = tiny.decoder(tiny.CASES[case])
    export(model, tmp_path, file_bytes=file_bytes, start_token=4, end_token=5)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for said in (theirs.config, theirs.generation_config):
        assert (said.bos_token_id, said.eos_token_id) == (4, 5)
    tokens_BL = tiny.tokens(2, 9)
    assert (theirs(tokens_BL).logits - model(tokens_BL)).abs().max() < 1e-5 * model(tokens_BL).abs().max()
    assert torch.equal(reload(tmp_path)(tokens_BL), model(tokens_BL))


def test_export_in_bf16(tmp_path: Path) -> None:
    model = tiny.decoder(tiny.CASES["tied"])
    export(model, tmp_path, dtype=torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert torch.equal(reload(tmp_path).model.norm.weight, model.model.norm.weight.bfloat16().float())


def test_second_export_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    export(tiny.decoder(tiny.CASES["llama"]), tmp_path, file_bytes=20_000)
    model = tiny.decoder(tiny.CASES["tied"], seed=1)
    export(model, tmp_path)
    assert [p.name for p in tmp_path.glob("model*")] == ["model.safetensors"]
    assert torch.equal(reload(tmp_path)(tiny.tokens(1, 5)), model(tiny.tokens(1, 5)))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_slice_is_that_of_the_whole(saved: Path, data: st.DataObject) -> None:
    whole = dict(canonical(tiny.decoder(tiny.CASES["biases"])))
    name = data.draw(st.sampled_from(sorted(whole)))
    shape = tuple(whole[name].shape)
    offsets = tuple(data.draw(st.integers(0, n)) for n in shape)
    sizes = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    shard = Shard(name, shape, offsets, torch.full(sizes, torch.nan, dtype=dtype))
    huggingface.load(saved, [shard])
    place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    assert torch.equal(shard.local, whole[name][place].to(dtype))


def test_only_the_files_of_the_wanted_tensors_are_opened(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "part")
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    for file in set(files.values()) - {files["model.norm.weight"]}:
        (folder / file).unlink()
    huggingface.load(folder, [Shard("model.norm.weight", (32,), (8,), torch.empty(4))])


def tokenizer_file(path: Path) -> Path:
    """A tokenizer that splits at every `e`, which Llama's own would not."""
    vocabulary = {chr(97 + i): i for i in range(26)} | {"<end>": 26, "?": 27, "<start>": 28}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<end>", "<start>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return path / "tokenizer.json"


@pytest.mark.parametrize("given_as", ["file", "folder"])
def test_tokenizer_goes_along(given_as: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    file = tokenizer_file(source)
    out = tmp_path / "out"
    given = file if given_as == "file" else source
    export(tiny.decoder(tiny.BASE), out, tokenizer=given, start_token=28, end_token=26)
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs("abe?").input_ids == [0, 1, 4, 27]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (28, 26)


@pytest.mark.parametrize(
    ("source", "end", "expected"),
    [
        ({"generation_config.json": "[7, 5]", "config.json": "7"}, 5, [7, 5]),
        ({"generation_config.json": "5", "config.json": "[5, 7]"}, 5, [5, 7]),
        ({"config.json": "7"}, 5, 5),
        ({"generation_config.json": "[7, 8]"}, 5, 5),
        ({"generation_config.json": "[7,"}, 5, 5),
        ({}, 5, 5),
    ],
    ids=["both", "config only", "another", "of another vocabulary", "damaged", "gone"],
)
def test_what_ended_a_text_before_training_still_does(source: dict, end: int, expected, tmp_path: Path) -> None:
    for name, ids in source.items():
        (tmp_path / name).write_text(f'{{"eos_token_id": {ids}}}')
    export(tiny.decoder(tiny.CASES["tied"]), tmp_path / "out", end_token=end, source=tmp_path)
    for name in ("config.json", "generation_config.json"):
        assert config.read_json(tmp_path / "out" / name)["eos_token_id"] == expected


def damage(folder: Path, kind: str) -> str:
    """Harms a folder in one way; returns what the message must name."""
    files = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    file = folder / files["model.layers.1.mlp.up_proj.weight"]
    tensors = load_file(file)
    if kind == "file missing":
        file.unlink()
    elif kind == "file torn":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "header torn":
        file.write_bytes(file.read_bytes()[:20])
    elif kind == "file empty":
        file.write_bytes(b"")
    elif kind == "tensor missing":
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file)
        return "model.layers.1.mlp.up_proj.weight"
    elif kind in ("wrong shape", "wrong type"):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].T.contiguous() if kind == "wrong shape" else tensors[name].to(torch.int8)
        save_file(tensors, file)
        return name
    elif kind == "not in index":
        del files["model.layers.1.mlp.up_proj.weight"]
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
        return "model.layers.1.mlp.up_proj.weight"
    elif kind == "index damaged":
        (folder / "model.safetensors.index.json").write_text("{")
        return "model.safetensors.index.json"
    elif kind == "biases not in config":
        settings_ = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings_ | {"attention_bias": False}))
        return "_proj.bias"
    elif kind == "only pickles":
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "pytorch_model.bin").touch()
        return "pytorch_model.bin"
    return file.name


@pytest.mark.parametrize(
    "kind",
    [
        "file missing", "file torn", "header torn", "file empty", "tensor missing", "wrong shape",
        "wrong type", "not in index", "index damaged", "biases not in config", "only pickles",
    ],
)  # fmt: skip
def test_damage_is_named(kind: str, saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "damaged")
    model = build(tiny.CASES["biases"])
    named = damage(folder, kind)
    with pytest.raises(ModelError) as raised:
        huggingface.load(folder, shards(model))
    assert named in str(raised.value)
    assert str(folder) in str(raised.value)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot be written"):
        export(tiny.decoder(tiny.BASE), tmp_path / "file" / "model")


def test_export_refuses_missing_tensors(tmp_path: Path) -> None:
    model = tiny.decoder(tiny.BASE)
    with pytest.raises(AssertionError, match="lm_head"):
        huggingface.export(model.options, list(canonical(model))[:-1], tmp_path)
    assert not (tmp_path / "config.json").exists()
    with pytest.raises(AssertionError, match="embed_tokens"):
        huggingface.export(replace(model.options, vocab_size=9), canonical(model), tmp_path)


SLICE = """
import sys, torch
from pathlib import Path
from shoal.checkpoint import huggingface
from shoal.shard import Shard
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
shard = Shard("one", (1 << 12, 1 << 12), (64, 0), torch.ones(64, 1 << 12))
class Whole:
    def __init__(self, piece):
        self.piece = piece
    def __getattr__(self, name):
        return getattr(self.piece, name)
    def __getitem__(self, place):
        return self.piece[:].clone()[place]
class File:
    def __init__(self, file):
        self.get_slice = lambda name: Whole(file.get_slice(name))
path = Path(sys.argv[1])
with huggingface._open(path) as file:
    before = peak()
    huggingface._read(File(file) if sys.argv[2] else file, path, shard, None)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_a_slice_is_read_without_the_rest(tmp_path: Path) -> None:
    """1 of 64 MiB, by what the process comes to hold."""
    path = tmp_path / "model.safetensors"
    save_file({"one": torch.ones(1 << 12, 1 << 12)}, path)

    def more(planted: str) -> int:
        command = [sys.executable, "-c", SLICE, str(path), planted]
        return int(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout)

    assert more("") < 8 << 20
    assert more("whole") > 32 << 20
