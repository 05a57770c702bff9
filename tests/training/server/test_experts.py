"""Models with experts through a server: balancing biases, which no gradient reaches, and how experts were used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shoal.checkpoint import huggingface
from shoal.data import tokenizer as tokenizers
from shoal.job import Job, Layout
from shoal.job.model import ModelOptions
from shoal.models import build, config
from shoal.models.spec import parameters
from shoal.models.storage import canonical
from shoal.observe import metrics
from shoal.ops.fill import Fill
from shoal.ops.initialise import initialise_
from shoal.sync.server import messages as m
from shoal.sync.server.messages import Apply, Key, Piece
from shoal.sync.server.node.read import Read
from shoal.training.server import hold, pull
from tests.training.server import runs
from tests.training.server.test_equality import QUIET, far

BIASES = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)]
FIGURES = ("balance_loss", "dropped_share", "busiest_load")
DEEPSEEK = ModelOptions(
    "deepseek_v3", vocab_size=264, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
    shared_expert_intermediate_size=24, first_k_dense_replace=1, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=12,
)  # fmt: skip
SERVER = {"name": "server"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Weights as they are published, with biases that change what tokens choose."""
    folder = tmp_path_factory.mktemp("published") / "hf"
    model = build(DEEPSEEK)
    for name, tensor in canonical(model):
        initialise_(tensor, name, tuple(tensor.shape), (0,) * tensor.ndim, Fill(float("norm" in name), 0.2), 0)
    huggingface.export(DEEPSEEK, canonical(model), folder)
    tokenizers.single_bytes().save(folder)
    return folder


def tuning(job: Job, folder: Path, layout: str) -> Job:
    """The same job from these weights, of whose experts the layout may know."""
    model = ModelOptions(weights=str(folder), router_aux_loss_coef=0.05, capacity_factor=1.0)
    return replace(job, layout=Layout.parse(layout), model=model, data=replace(job.data, tokenizer="auto"))


@pytest.mark.parametrize(
    ("layout", "server"),
    [
        ("replicas=2", {"shards": 2}),
        *(
            pytest.param(layout, server, marks=pytest.mark.nightly)
            for layout, server in (
                ("replicas=2,fsdp=2,expert=2,micro_batch=3", {"shards": 1}), ("replicas=2,pipeline=2", {"shards": 3}),
                ("replicas=2,tensor=2,replica_share=2+1", {"shards": 2, "copies": 2}),
            )
        ),
    ],
)  # fmt: skip
def test_published_weights_in_fp64_as_one_process(ranks, train, tiny, tmp_path, folder, layout, server):
    """Losses, norms, weights, the biases to the last bit, and what rows say of the use of experts."""
    one, many = tmp_path / "one", tmp_path / "many"
    options = {**QUIET, "train": {"steps": 4, "validate_every": 1000, "precision": "fp64"}}
    train(tuning(tiny(one, **options), folder, "replicas=1"))
    runs.run(ranks, tuning(tiny(many, sync=SERVER, server=server, **options), folder, layout))
    assert max(far(many, one)) < 1e-8
    mine, theirs = runs.weights(many), runs.weights(one)
    assert all(torch.equal(mine[name], theirs[name]) and theirs[name].all() for name in BIASES)
    rows = list(zip(metrics.read(many), metrics.read(one), strict=True))
    for row, expected in rows:
        assert [row[name] for name in FIGURES] == pytest.approx([expected[name] for name in FIGURES], rel=1e-8)
    assert all(0 < row["dropped_share"] < 1 < row["busiest_load"] for row, _ in rows)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("server", "sync"),
    [
        ({"mode": "asp", "compensation": "look-ahead"}, {"codec": "int4"}),
        ({"mode": "ssp", "level": "hogwild", "staleness": 1}, {}),
        ({"mode": "asp", "compensation": "dc"}, {}),
        ({"local_steps": 2}, {}),
    ],
    ids=["look-ahead, int4", "hogwild", "dc", "local steps"],
)
def test_biases_stay_as_they_are_in_every_mode(ranks, tiny, tmp_path, folder, server, sync):
    """Also of a shard and a worker that are killed."""
    run = tmp_path / "run"
    options = {"data": QUIET["data"], "train": {"steps": 40, "validate_every": 1000}, "checkpoint": {"every": 10}}
    job = tiny(run, sync=SERVER | sync, server={"shards": 2} | server, **options)
    with runs.Killer(run, [(3, "shoal-server"), (8, "shoal-worker")]) as killer:
        figures = runs.run(ranks, tuning(job, folder, "replicas=2"))
    assert (figures["step"], len(killer.waits)) == (40, 2)
    published, found = load_file(folder / "model.safetensors"), runs.weights(run)
    assert all(torch.equal(found[name], published[name]) for name in BIASES)
    assert metrics.read(run)[-1]["busiest_load"] > 1


@pytest.mark.nightly
def test_a_worker_tells_of_all_steps_of_its_own(ranks, train, tiny, tmp_path, folder):
    """With the servers where it went: the mean, over tokens, of two steps without one."""
    one, many = tmp_path / "one", tmp_path / "many"
    options = {**QUIET, "train": {"steps": 4, "validate_every": 1000, "precision": "fp64"}}
    train(tuning(tiny(one, **options), folder, "replicas=1"))
    outer = {"outer_lr": 1.0, "outer_momentum": 0.0}
    job = tiny(many, sync=SERVER | outer, server={"local_steps": 2}, **options)
    runs.run(ranks, tuning(job, folder, "replicas=1"))
    alone = metrics.read(one)
    for row, steps in zip(metrics.read(many), (alone[:2], alone[2:]), strict=True):
        tokens = sum(step["tokens"] for step in steps)
        for name in FIGURES[:2]:
            mean = sum(step[name] * step["tokens"] for step in steps) / tokens
            assert row[name] == pytest.approx(mean, rel=1e-8)


def ones(pieces: Sequence[Piece]) -> list[torch.Tensor]:
    return [torch.ones(piece.shape) for piece in pieces]


@pytest.mark.parametrize("compensation", ["none", "look-ahead", "delayed-nesterov"])
def test_servers_hold_give_and_save_what_is_not_learned(tiny, tmp_path, folder, compensation):
    """As it is, with whatever optimizer: workers pull it, readers have all of the model, and a checkpoint has no state
    of the optimizer for it."""
    server = {"shards": 2, "mode": "asp", "compensation": compensation}
    job = tiny(tmp_path, optim={"name": "sgd", "weight_decay": 0.1}, sync=SERVER, server=server)
    job = replace(job, model=replace(config.read(folder), weights=str(folder)))
    published = load_file(folder / "model.safetensors")
    read, saved = [], []
    for number in range(2):
        held = hold.empty(job, number)
        hold.first_weights(held.shards, job)
        is_fixed = [piece.name in BIASES for piece in held.pieces()]
        learned = [piece for piece in held.pieces() if piece.name not in BIASES]
        for version in (1, 2):
            held.put(gradient := held.blank(), learned, ones(learned))
            assert [square.value == 0 for square in held.squares(gradient)] == is_fixed
            held.apply(gradient, Apply(version, (Key(0, 0, version),), 0.1, 0.1, 0), None)
        for weights in (held.freeze(), held.live(), held.master()):
            before = [published[piece.name].narrow(0, piece.offsets[0], piece.shape[0]) for piece in held.pieces()]
            assert [torch.equal(*both) for both in zip(weights, before, strict=True)] == is_fixed
        read.append((m.Pulled(Key(0, 0, 0), number, 2, held.pieces()), held.master()))
        saved += [shard.name for shard in held.state().shards]
    assert {shard.name for shard in pull._shards(job, Read(2, read))} == parameters(job.model).keys()
    assert [name for name in saved if name.endswith("bias")] == BIASES
