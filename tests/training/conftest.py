"""A small corpus that every test of this folder trains on."""

from __future__ import annotations

import random

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with forty short texts that a small model learns something of."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "the a one small large fish bird shoal swims flies over under with and then it they we you".split()
    chance = random.Random(3)
    for number in range(40):
        lines = [" ".join(chance.choices(words, k=chance.randint(4, 12))) + "." for _ in range(chance.randint(3, 60))]
        (folder / f"text-{number:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def arguments(corpus, tmp_path_factory):
    """Words of a `shoal train` of a tiny model, with several gradient buckets."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    return [
        "train", "--data", str(corpus), "--data.cache", str(cache), "--data.tokenizer", "bytes",
        "--data.sequence-length", "64", "--data.validation", "0.1",
        "--model.hidden-size", "48", "--model.intermediate-size", "96", "--model.num-hidden-layers", "3",
        "--model.num-attention-heads", "4", "--model.num-key-value-heads", "2",
        "--train.precision", "fp32", "--train.compile", "off", "--train.global-batch", "12", "--run.threads", "1",
        "--sync.bucket-mib", "0.05",
    ]  # fmt: skip
