"""A model that ranks share writes what it writes in one process, in every placement of stages and share of matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from shoal import Job, Layout, job
from shoal.checkpoint import Saver, huggingface
from shoal.cli.main import main
from shoal.errors import JobError, LayoutError, ModelError
from shoal.launch.generate import generate
from shoal.models import build
from shoal.models.spec import parameters
from shoal.models.storage import canonical
from shoal.ops.fill import Fill
from shoal.ops.initialise import initialise_
from shoal.serving.load import load
from shoal.shard import Shard, State
from tests.models import experts, tiny
from tests.numbers import largest

# As many blocks as any layout here has stages, and one more.
MODELS = {
    "tied": replace(tiny.CASES["tied"], num_hidden_layers=5, max_position_embeddings=24),
    "llama": replace(tiny.CASES["llama"], num_hidden_layers=5),
    "one_key_head": replace(tiny.CASES["one_key_head"], num_hidden_layers=5, attention_bias=True, mlp_bias=True),
    "qwen2_moe": replace(experts.QWEN2, num_hidden_layers=5),
    "qwen3_moe": replace(experts.QWEN3, num_hidden_layers=5),
    "deepseek_v3": replace(experts.DEEPSEEK, num_hidden_layers=5),
}
SCHEDULES = ["gpipe", "1f1b", "interleaved", "looped_bfs", "interleaved_zero_bubble", "zbv", "dualpipev"]
PIECES = [[1, 5, 2, 9, 30], [7], [7], [61], [3, 4], [66]]
BOUND = 1e-10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a model in Hugging Face's format, with a tokenizer of one token a word."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = _exported(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


def _exported(name: str, path: Path) -> Path:
    model = build(MODELS[name])
    for piece, tensor in canonical(model):
        fill = Fill(0.0, 0.2)
        initialise_(tensor, piece, tuple(tensor.shape), (0,) * tensor.ndim, fill, 0)
    last = model.options.vocab_size - 1
    words = {f"w{i}": i for i in range(last)} | {"<end>": last}
    known = tokenizers.Tokenizer(WordLevel(words, unk_token="w0"))
    known.pre_tokenizer = WhitespaceSplit()
    known.add_special_tokens(["<end>"])
    known.save(str(path / "words.json"))
    huggingface.export(model.options, canonical(model), path, tokenizer=path / "words.json", end_token=last)
    return path


@cache
@torch.no_grad()
def whole(folder: Path) -> Tensor:
    """(N, V): logits in one process, without a cache, after each piece."""
    ends = torch.tensor([len(piece) for piece in PIECES]).cumsum(0) - 1
    return load(folder).double()(torch.tensor([[*chain(*PIECES)]]))[0, ends]


def difference(ranks, folder: Path, layout: str, bug: str = "") -> float:
    """Of the ranks that have logits, the largest, relative to the largest logit."""
    found = run(ranks, folder, layout, bug)
    made = [torch.tensor(rank["logits"], dtype=torch.float64) for rank in found if rank["logits"]]
    assert len(made) == Layout.parse(layout).tensor
    expected = whole(folder)
    return largest(float((logits - expected).abs().max() / expected.abs().max()) for logits in made)


def run(ranks, folder: Path, layout: str, bug: str = "") -> list[dict[str, Any]]:
    world = Layout.parse(layout).world
    return ranks.run("tests.serving.cases:logits", world, folder=str(folder), layout=layout, pieces=PIECES, bug=bug)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(ranks, folder, schedule):
    assert difference(ranks, folder("tied"), f"pipeline=2,schedule={schedule}") < BOUND


@pytest.mark.parametrize(
    "layout",
    ["pipeline=4", "pipeline=2,schedule=interleaved,stages=1+1+1+2", "tensor=2", "tensor=4",
     "pipeline=2,tensor=2,schedule=dualpipev"],
)  # fmt: skip
def test_other_layouts(ranks, folder, layout):
    assert difference(ranks, folder("tied"), layout) < BOUND


@pytest.mark.parametrize("layout", ["tensor=4", "pipeline=2,tensor=2,schedule=zbv"])
@pytest.mark.parametrize("model", [name for name in MODELS if name != "tied"])
def test_every_kind_of_model(ranks, folder, model, layout):
    """Key heads fewer than ranks, experts (whole on each tensor rank), shared ones (cut), latent attention."""
    assert difference(ranks, folder(model), layout) < BOUND


@pytest.mark.parametrize(
    ("bug", "layout"), [("unsummed", "tensor=2"), ("one cache", "pipeline=2,schedule=zbv")], ids=["tensor", "pipeline"]
)
def test_sees_planted_bug(ranks, folder, bug, layout):
    assert difference(ranks, folder("tied"), layout, bug) > 1e-2


def test_no_rank_holds_the_whole(ranks, folder):
    """Of every matrix half a stage's, of what is not cut all of it, and the keys that its query heads look at."""
    found = run(ranks, folder("llama"), "pipeline=2,tensor=2,schedule=zbv")
    sizes = {name: prod(spec.shape) for name, spec in parameters(MODELS["llama"]).items()}
    for name, size in sizes.items():
        most = size if "norm" in name else -(-size // 2) + MODELS["llama"].hidden_size
        holders = [rank["held"][name] for rank in found if name in rank["held"]]
        assert len(holders) == 2, name
        assert size <= sum(holders) <= 2 * most, name
        assert max(holders) <= most, name
    o, tokens = MODELS["llama"], sum(map(len, PIECES))
    kept = [blocks * tokens * o.num_key_value_heads // 2 * 2 * o.head_size for blocks in (3, 3, 2, 2)]
    assert sorted(rank["cached"] for rank in found) == sorted(kept)


def test_text_of_a_run_in_the_layout_it_was_trained_in(folder, tmp_path, capfd):
    """Every word of the layout that says how to train is passed over."""
    trained = Layout.parse("pipeline=2,tensor=2,schedule=zbv,micro_batch=1")
    model = load(folder("tied"))
    (tmp_path / "job.toml").write_text(job.write(Job(model=model.options, layout=trained)))
    (tmp_path / "tokenizer.json").write_bytes((folder("tied") / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with Saver(tmp_path / "checkpoints", 0, 1, 2, nonce="test") as saver:
        pieces = [Shard(name, tuple(p.shape), (0,) * p.ndim, p) for name, p in canonical(model)]
        saver.save(State(pieces, {}), 1).wait()
    words = ["generate", str(tmp_path), "--prompt", "w1 w5", "--max-tokens", "99", "--seed", "2"]
    assert main(words) == 0
    alone = capfd.readouterr()
    assert main([*words, "--layout", str(trained)]) == 0
    assert capfd.readouterr() == alone
    assert alone.out.startswith("w1 w5")
    assert "context of 24 tokens is full" in alone.err


def test_what_cannot_be_is_refused(ranks, folder):
    llama = folder("llama")
    for layout, axes, fix in (
        ("fsdp=2", "fsdp=2", "layout=pipeline=2"),
        ("replicas=2", "replicas=2", "leave it out"),
        ("replicas=2,pipeline=2,schedule=zbv,micro_batch=3", "replicas=2", "layout=pipeline=2,schedule=zbv"),
        ("context=2,tensor=2,expert=2", "context=2, expert=2", "layout=tensor=2"),
    ):
        with pytest.raises(LayoutError, match=f"not {axes}") as refused:
            generate(llama, "w1", layout=layout)
        assert refused.value.fix.startswith(fix)
    with pytest.raises(LayoutError, match="4 query heads") as refused:
        generate(llama, "w1", layout="tensor=3")
    assert refused.value.fix == "layout tensor=2 would do; or tensor=1, 2 or 4"
    with pytest.raises(LayoutError, match="6 stages, the model only 5 blocks"):
        generate(llama, "w1", layout="pipeline=3,schedule=zbv")
    with pytest.raises(JobError, match="in memory"):
        generate(load(llama), "w1", layout="pipeline=2")
    with pytest.raises(ModelError, match="no such folder"):
        generate(llama / "nowhere", "w1", layout="pipeline=2")
    with pytest.raises(ModelError, match="the prompt has 500 tokens"):
        ranks.run(
            "shoal.serving.staged:main", 2, folder=str(llama), options=asdict(MODELS["llama"]), tokenizer=str(llama),
            prompt="w1 " * 500, max_tokens=2, seed=0, layout="tensor=2",
        )  # fmt: skip
