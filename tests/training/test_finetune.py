"""Training goes on from a folder that transformers wrote: the first loss is transformers' own."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from shoal.data import tokenizer as tokenizers
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.errors import JobError
from shoal.job import Job, read
from shoal.job.model import ModelOptions
from shoal.launch.train import ready
from shoal.observe import metrics
from shoal.serving.text import load_tokenizer
from tests.models import tiny as models


@pytest.fixture(scope="module", params=["tied", "llama"])
def folder(request, tmp_path_factory):
    """A random model with a tokenizer of bytes; more rows in its vocabulary than tokens, as published ones have."""
    folder = tmp_path_factory.mktemp("hf")
    options = models.replace(models.CASES[request.param], vocab_size=264, initializer_range=0.1)
    models.transformers_twin(models.decoder(options, seed=4)).save_pretrained(folder)
    tokenizers.single_bytes().save(folder)
    return folder


def first_loss(folder, job, prepared) -> float:
    """transformers' mean over the tokens of the first global batch, piece by piece."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    batch = Loader(Prepared.load(prepared), job.data, "train", job.train.global_batch, job.train.seed).batch(0, 0, 1)
    total, count = 0.0, 0
    with torch.no_grad():
        for tokens, labels, document, weight in zip(
            batch.tokens_BL, batch.labels_BL, batch.document_BL, batch.weight_BL, strict=True
        ):
            for number in document[weight > 0].unique():
                here = document == number
                logits = model(tokens[here][None]).logits[0]
                total += F.cross_entropy(logits, labels[here], reduction="sum").item()
                count += int(here.sum())
    assert count == batch.weight_BL.sum()
    return total / count


def from_weights(job: Job, folder: Path, **options) -> Job:
    """A job that goes on from a folder, with its tokenizer."""
    model = ModelOptions(weights=str(folder), **options)
    return replace(job, model=model, data=replace(job.data, tokenizer="auto"))


@pytest.mark.parametrize("layout", ["replicas=2", "fsdp=2,zero=3", "tensor=2", "pipeline=2", "context=2"])
def test_first_loss_is_that_of_transformers(ranks, tiny, folder, tmp_path, layout):
    run = tmp_path / "run"
    job = from_weights(tiny(run, layout, train={"steps": 4}), folder)
    job, arguments = ready(job, None, time.time())
    ranks.run("shoal.training.worker:main", 2, **arguments)
    losses = [row["loss"] for row in metrics.read(run)]
    assert losses[0] == pytest.approx(first_loss(folder, job, arguments["prepared"]), abs=1e-5)
    assert losses[-1] < losses[0]
    settled = read(run / "job.toml")
    assert settled.model.vocab_size == 264
    assert settled.data.tokenizer == str(folder)


def test_goes_on_when_the_folder_it_came_from_is_gone(train, tiny, folder, tmp_path):
    """The weights are those of the checkpoint; a run from another folder would be another run, and is refused."""
    gone, run = shutil.copytree(folder, tmp_path / "gone"), tmp_path / "run"
    train(from_weights(tiny(run, train={"steps": 6}, checkpoint={"every": 3, "keep": 2}), gone))
    before = metrics.read(run)
    shutil.rmtree(gone)
    shutil.rmtree(run / "checkpoints/step-00000006")
    train(tiny(run), resume=True, finish=True)
    assert [row["loss"] for row in metrics.read(run)] == [row["loss"] for row in before]
    assert [row["step"] for row in metrics.read(run)] == [1, 2, 3, 4, 5, 6]
    assert (run / "model" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def chat(folder, tmp_path_factory):
    """The model with a tokenizer as Llama's: texts begin with another token than they end with, or a turn does."""
    chat = shutil.copytree(folder, tmp_path_factory.mktemp("chat") / "model")
    bytes_ = tokenizers.single_bytes()
    bytes_.model.add_special_tokens(["<s>", "</s>", "<turn>"])
    replace(bytes_, start=257, end=258).save(chat)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((chat / name).read_text())
        (chat / name).write_text(json.dumps(said | {"bos_token_id": 257, "eos_token_id": [258, 259]}))
    (chat / "chat_template.jinja").write_text("{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}")
    return chat


def test_what_begins_and_ends_a_text_stays(train, tiny, chat, tmp_path):
    run = tmp_path / "run"
    train(from_weights(tiny(run, "replicas=1", train={"steps": 1}), chat), finish=True)
    for name in ("config.json", "generation_config.json"):
        said = json.loads((run / "model" / name).read_text())
        assert (said["bos_token_id"], said["eos_token_id"]) == (257, [258, 259])
    theirs = AutoTokenizer.from_pretrained(run / "model")
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<turn>hi"
    assert load_tokenizer(run).ends == {258, 259}


def test_another_architecture_is_refused_before_anything_is_read(tiny, folder, tmp_path):
    job = tiny(tmp_path / "run", data={"source": ("no/such/file",)})
    with pytest.raises(JobError, match=r"model.num_hidden_layers=5, but theirs is 3"):
        ready(from_weights(job, folder, num_hidden_layers=5), None, time.time())
    job = replace(job, data=replace(job.data, sequence_length=129))
    with pytest.raises(JobError, match=r"sequence_length=129 .*max_position_embeddings=128"):
        ready(from_weights(job, folder).validate(), None, time.time())
    assert not (tmp_path / "run").exists()
