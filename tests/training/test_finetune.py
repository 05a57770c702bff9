"""Training goes on from a folder that transformers wrote: the first loss is transformers' own."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from shoal.data import tokenizer as tokenizers
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.job import read
from shoal.launch.train import ready
from shoal.observe import metrics
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


@pytest.mark.parametrize("layout", ["replicas=2", "fsdp=2,zero=3"])
def test_first_loss_is_that_of_transformers(ranks, tiny, folder, tmp_path, layout):
    run = tmp_path / "run"
    job = tiny(run, layout, train={"steps": 4}, model={"weights": str(folder)}, data={"tokenizer": "auto"})
    job, arguments = ready(job, None, time.time())
    ranks.run("shoal.training.worker:main", 2, **arguments)
    losses = [row["loss"] for row in metrics.read(run)]
    assert losses[0] == pytest.approx(first_loss(folder, job, arguments["prepared"]), abs=1e-5)
    assert losses[-1] < losses[0]
    settled = read(run / "job.toml")
    assert settled.model.vocab_size == 264
    assert settled.data.tokenizer == str(folder)
