"""A small corpus that every test of this folder trains on, and ways to train on it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shoal.job import Job, Layout, read
from shoal.job.data import DataOptions
from shoal.job.model import ModelOptions
from shoal.job.run import RunOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions
from shoal.launch.train import ready


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with forty short texts that a small model learns something of."""
    folder = tmp_path_factory.mktemp("corpus")
    words = [
        "the", "a", "one", "small", "large", "fish", "bird", "shoal", "swims",
        "flies", "over", "under", "with", "and", "then", "it", "they", "we", "you",
    ]  # fmt: skip
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


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory) -> Callable[..., Job]:
    """tiny(run folder, layout, train={...}, ...): the job of `arguments`, with some options changed by table."""
    base = Job(
        data=DataOptions(
            source=(str(corpus),), cache=str(tmp_path_factory.getbasetemp() / "cache"), tokenizer="bytes",
            sequence_length=64, validation=0.1,
        ),
        model=ModelOptions(
            hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
        ),
        train=TrainOptions(steps=8, global_batch=12, precision="fp32", compile="off"),
        sync=SyncOptions(bucket_mib=0.05),
        run=RunOptions(threads=1),
    )  # fmt: skip

    def change(run: Path | str, layout: str = "replicas=2", **tables: dict[str, Any]) -> Job:
        job = replace(base, layout=Layout.parse(layout))
        tables["run"] = {"dir": str(run)} | tables.get("run", {})
        for table, options in tables.items():
            job = replace(job, **{table: replace(getattr(job, table), **options)})
        return job.validate()

    return change


@pytest.fixture(scope="session")
def train(ranks) -> Callable[..., list[Any]]:
    """train(job): what `shoal train` does, but in the ranks of this session; gives what each rank returned.

    entry: what ranks call instead of the worker. args: beyond the worker's own, or instead of them. finish: and
    what follows it.
    """

    def run(
        job: Job,
        *,
        resume: bool = False,
        entry: str = "shoal.training.worker:main",
        finish: bool = False,
        **args: Any,
    ) -> list[Any]:
        folder = job.run.dir
        if resume:
            job = read(Path(folder) / "job.toml")
        job, arguments = ready(job, folder if resume else None, time.time())
        assert job.layout is not None
        results = ranks.run(entry, job.layout.world, **(arguments | args))
        if finish:
            where = {name: arguments[name] for name in ("folder", "prepared")}
            ranks.run("shoal.launch.finish:main", 1, **where, figures=results[0])
        return results

    return run
