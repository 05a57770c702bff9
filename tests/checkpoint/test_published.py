"""What DeepSeek publishes loads: fp8 in blocks against numbers worked out by hand, and a tiny folder with YaRN, fp8 and
a layer that predicts further tokens against transformers, in one process and on several ranks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from shoal import checkpoint
from shoal.checkpoint import contents, convert, fp8, huggingface, safetensors
from shoal.checkpoint.blocks import Box
from shoal.checkpoint.fp8 import Scales
from shoal.data import tokenizer as tokenizers
from shoal.errors import ModelError
from shoal.models import config
from shoal.models.spec import parameters
from shoal.serving.generate import generate
from shoal.serving.load import load
from shoal.shard import Shard
from tests.checkpoint import published
from tests.equivalence import cases
from tests.models import experts, tiny

# Matrices of 204 × 136, 68 × 136, 300 × 136 and 136 × 300 elements: none a multiple of 128 on both sides, some smaller.
ODD = replace(
    tiny.BASE, hidden_size=136, intermediate_size=300, num_hidden_layers=1, num_attention_heads=6,
    num_key_value_heads=2, head_dim=34, vocab_size=5,
)  # fmt: skip
# Blocks of a few elements: every rank's part begins inside of one.
BLOCK = (5, 3)
DEEPSEEK = replace(experts.CASES["deepseek_v3, yarn"], vocab_size=cases.VOCAB, initializer_range=0.2)
LINE = f"left out: {len(published.FURTHER)} tensors of the multi-token-prediction layer"


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published.publish(ODD, tmp_path_factory.mktemp("odd"), (128, 128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All three: YaRN, fp8, and a layer that predicts further tokens."""
    return published.publish(DEEPSEEK, tmp_path_factory.mktemp("deepseek"), BLOCK, further=1)


def by_hand(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "plain" / "model.safetensors")


def whole(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    like = by_hand(folder)[name]
    shard = Shard(name, tuple(like.shape), (0,) * like.ndim, torch.full_like(like, torch.nan, dtype=dtype))
    huggingface.load(folder, [shard])
    return shard.local


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_are_those_worked_out_by_hand(odd: Path, dtype: torch.dtype) -> None:
    for name, expected in by_hand(odd).items():
        assert torch.equal(whole(odd, name, dtype), expected.to(dtype)), name


def test_scales_may_be_rounded(tmp_path: Path) -> None:
    published.publish(tiny.BASE, tmp_path, BLOCK, scale_type=torch.bfloat16)
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(whole(tmp_path, name), by_hand(tmp_path)[name])


def some_part(data: st.DataObject, folder: Path) -> tuple[Shard, torch.Tensor]:
    """A shard to be filled, and what it is then."""
    tensors = by_hand(folder)
    name = data.draw(st.sampled_from(sorted(name for name, tensor in tensors.items() if tensor.ndim == 2)))
    shape = tuple(tensors[name].shape)
    offsets = tuple(data.draw(st.integers(0, n)) for n in shape)
    sizes = tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offsets, strict=True))
    place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
    return Shard(name, shape, offsets, torch.full(sizes, torch.nan)), tensors[name][place]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_part_is_that_of_the_whole(odd: Path, data: st.DataObject) -> None:
    """Parts that begin inside a block, read through pieces of any size."""
    shard, expected = some_part(data, odd)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8, "LIMIT", data.draw(st.sampled_from([7, 136, 1000, 1 << 18])))
        huggingface.load(odd, [shard])
    assert torch.equal(shard.local, expected)


_dequantise = Scales.dequantise


def _by_local_index(self: Scales, scale: Any, box: Box, numbers: torch.Tensor) -> torch.Tensor:
    return _dequantise(self, scale, Box((0,) * len(box.shape), box.shape), numbers)


def test_sees_a_grid_that_begins_with_the_part(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted bug: blocks counted from the start of what is read."""
    name = "model.layers.0.mlp.up_proj.weight"
    shard = Shard(name, (300, 136), (100, 0), torch.empty(60, 136))
    expected = by_hand(odd)[name][100:160]
    huggingface.load(odd, [shard])
    assert torch.equal(shard.local, expected)
    monkeypatch.setattr(Scales, "dequantise", _by_local_index)
    huggingface.load(odd, [shard])
    assert torch.equal(shard.local[:, :128], by_hand(odd)[name][100:160, :128]) is False
    assert (shard.local - expected).norm() > 1e-3 * expected.norm()


def test_no_more_than_a_piece_is_held(odd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watched(self: Scales, scale: Any, box: Box, numbers: torch.Tensor) -> torch.Tensor:
        seen.append(numbers.numel())
        return _dequantise(self, scale, box, numbers)

    monkeypatch.setattr(fp8, "LIMIT", 1000)
    monkeypatch.setattr(Scales, "dequantise", watched)
    whole(odd, "model.layers.0.mlp.up_proj.weight")
    assert max(seen) <= 1000
    assert sum(seen) == 300 * 136


@pytest.mark.parametrize("block", [64, 1 << 12, 1 << 20])
def test_import_stores_the_same_numbers(odd: Path, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In files that cut matrices between rows, through blocks that cut rows."""
    monkeypatch.setattr(safetensors, "BLOCK", block)
    convert.import_hf(odd, tmp_path / "run", file_bytes=100_000)
    saved = contents.find(tmp_path / "run")
    assert checkpoint.verify(saved) == []
    facts = contents.contents(saved)
    assert len(facts["files"]) > 3
    assert facts["kinds"]["model"]["dtypes"] == ["F32"]
    found = dict(checkpoint.tensors(saved))
    assert list(found) == list(parameters(ODD))
    assert all(torch.equal(found[name], expected) for name, expected in by_hand(odd).items())


def damage(folder: Path, kind: str) -> str:
    """Harms a folder in one way; returns what the message must name."""
    name = "model.layers.0.mlp.up_proj.weight"
    stored, scales = (folder / f"model-0000{n}-of-00002.safetensors" for n in (1, 2))
    tensors = load_file(scales)
    if kind == "scale not in index":
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        del index["weight_map"][f"{name}_scale_inv"]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "scale missing":
        del tensors[f"{name}_scale_inv"]
        save_file(tensors, scales)
    elif kind == "scale of other blocks":
        tensors[f"{name}_scale_inv"] = torch.ones(3, 1)
        save_file(tensors, scales)
    elif kind == "scale beside other numbers":
        tensors = load_file(stored)
        tensors[name] = tensors[name].to(torch.bfloat16)
        save_file(tensors, stored)
    elif kind == "not said":
        words = json.loads((folder / "config.json").read_text())
        del words["quantization_config"]
        (folder / "config.json").write_text(json.dumps(words))
        return "_scale_inv"
    return name


@pytest.mark.parametrize(
    "kind",
    ["scale not in index", "scale missing", "scale of other blocks", "scale beside other numbers", "not said"],
)
def test_damage_is_named(odd: Path, kind: str, tmp_path: Path) -> None:
    folder = shutil.copytree(odd, tmp_path / "damaged")
    named = damage(folder, kind)
    for work in (lambda: load(folder), lambda: convert.import_hf(folder, tmp_path / "out")):
        with pytest.raises(ModelError) as raised:
            work()
        assert named in str(raised.value)
        assert raised.value.fix
        assert not (tmp_path / "out").exists()


def test_further_layers_are_left_out_and_said(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    load(folder, said.append)
    convert.import_hf(folder, tmp_path / "run", say=said.append)
    assert said == [LINE, LINE]
    words = json.loads((folder / "config.json").read_text())
    others = shutil.copytree(folder, tmp_path / "others")
    (others / "config.json").write_text(json.dumps(words | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ModelError, match=rf"{len(published.FURTHER)} tensors are more than .*model\.layers\.3\."):
        load(others)


def test_equals_transformers(folder: Path) -> None:
    """Which reads the same numbers as float32, beyond the 16 positions before YaRN. Gradients of YaRN are in
    tests/models/test_moe_parity.py."""
    twin = AutoModelForCausalLM.from_pretrained(folder / "plain", attn_implementation="eager").eval()
    tokens_BL = tiny.tokens(2, 60, cases.VOCAB)
    ours, theirs = load(folder)(tokens_BL), twin(tokens_BL).logits
    assert (ours - theirs).norm() < 1e-5 * theirs.norm()


def test_generates_and_exports(folder: Path, tmp_path: Path) -> None:
    vocabulary = replace(DEEPSEEK, vocab_size=257)
    published.publish(vocabulary, tmp_path, BLOCK, further=1)
    tokenizers.single_bytes().save(tmp_path)
    text = generate(tmp_path, "a", max_tokens=20, temperature=0.0)
    assert len(text) > 1
    assert generate(load(tmp_path / "plain"), "a", tokenizer=tmp_path, max_tokens=20, temperature=0.0) == text
    convert.import_hf(folder, tmp_path / "run", say=lambda line: None)
    convert.export_hf(contents.find(tmp_path / "run"), tmp_path / "back")
    assert config.read_json(tmp_path / "back" / "config.json")["num_nextn_predict_layers"] == 0
    tensors = load_file(tmp_path / "back" / "model.safetensors")
    assert tensors.keys() == by_hand(folder).keys()
    assert all(torch.equal(tensors[name], expected) for name, expected in by_hand(folder).items())


@pytest.mark.parametrize("layout", ["tensor=2", "fsdp=2"])
def test_trains_on_ranks_as_in_one_process(ranks: Any, folder: Path, layout: str) -> None:
    """From weights each rank has read its own part of."""
    (alone,) = ranks.run("tests.checkpoint.published:train", 1, layout="replicas=1", folder=str(folder))
    expected = {
        what: {name: torch.tensor(values, dtype=torch.float64) for name, _, values in alone[what]}
        for what in ("gradients", "weights")
    } | {what: alone[what] for what in ("losses", "norms")}
    results = ranks.run("tests.checkpoint.published:train", 2, layout=layout, folder=str(folder))
    cases.assert_one_answer(results, expected)
