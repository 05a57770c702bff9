"""A run on a growing store: its tokenizer, what was appended meanwhile, and no other store under the same name."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest

from shoal.data.prepare import Prepared, prepare
from shoal.errors import DataError
from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.optim import OptimOptions
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions
from shoal.launch.resume import resumable
from shoal.launch.train import architecture
from shoal.training.folder import fill
from tests.data.corpora import appended


@pytest.fixture
def job(tmp_path) -> Job:
    """On a store whose tokenizer is not the usual one."""
    appended(tmp_path / "store", ["what", "the run", "began with"], tokenizer="bytes")
    return Job(
        layout=Layout(replicas=2),
        data=DataOptions(source=(str(tmp_path / "store"),), grow=True, order="sequential"),
        sync=SyncOptions(name="server"),
        optim=OptimOptions(schedule="constant", warmup=0.0),
        train=TrainOptions(steps=9),
    )


def test_without_a_word_on_tokenizers_the_run_takes_that_of_the_store(job):
    assert prepare(architecture(job).data).vocab_size == 257
    ordinary = replace(job, data=replace(job.data, grow=False))
    assert architecture(ordinary).data.tokenizer == "bpe"


def test_a_run_goes_on_with_its_own_store(job, tmp_path):
    store, run = tmp_path / "store", tmp_path / "run"
    run.mkdir()
    fill(run, job, Prepared.load(store))
    appended(store, ["later"])
    assert resumable(job, run, print).train.documents == 4
    shutil.rmtree(store)
    with pytest.raises(DataError, match="no growing store"):
        resumable(job, run, print)
    appended(store, ["another", "store"])
    with pytest.raises(DataError, match="the text has changed since this run began"):
        resumable(job, run, print)
