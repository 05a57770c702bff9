"""Options out of range are refused before anything starts, in one sentence that says what would do."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.job import Job, Layout, read, write
from shoal.job.check import fit, nearest, similar
from shoal.job.data import DataOptions
from shoal.job.fits import check_batch
from shoal.job.model import ModelOptions
from shoal.job.optim import OptimOptions
from shoal.job.toml import parse


def test_the_default_job_is_valid():
    Job().validate()


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_every_recipe_is_valid(path: Path):
    read(path).validate()


@pytest.mark.parametrize(
    ("toml", "what", "fix"),
    [
        ("data.sequence_length = 0", "data.sequence_length=0 is less than 1", "1 or more"),
        ("data.source = []", "data.source is empty", "name a file"),
        ("data.validation = 1.0", "data.validation=1.0", "0.02"),
        ("data.pack = 'bestfit'", "data.pack='bestfit' is unknown", "'best_fit'"),
        ("data.order = 'shuffled'", "data.order='shuffled' is unknown", "random"),
        ("train.global_batch = 0", "train.global_batch=0 is less than 1", "1 or more"),
        ("train.steps = -1", "train.steps=-1 is less than 0", "0 or more"),
        ("train.minutes = 0", "the run has no length", "train.steps"),
        ("train.minutes = nan", "train.minutes=nan is not a finite number", ""),
        ("train.seed = -1", "train.seed=-1 is less than 0", ""),
        ("train.precision = 'bf61'", "train.precision='bf61' is unknown", "'bf16'"),
        ("train.compile = 'yes'", "train.compile='yes' is unknown", "auto"),
        ("train.on_nonfinite = 'stopp'", "train.on_nonfinite='stopp' is unknown", "'stop'"),
        ("optim.lr = 0", "optim.lr=0.0 is not positive", "above 0"),
        ("optim.lr = inf", "optim.lr=inf is not a finite number", ""),
        ("optim.betas = [0.9, 1.0]", "optim.betas: 1.0 is not in [0, 1)", "0.9"),
        ("optim.warmup = 2.5", "optim.warmup=2.5 is neither a share nor a number of steps", "whole number"),
        ("optim.warmup = inf", "optim.warmup=inf is not a finite number", ""),
        ("optim.decay = 2", "optim.decay=2.0 is not a share", "0 to 1"),
        ("optim.name = 'adam'", "optim.name='adam' is unknown", "'adamw'"),
        ("model.family = 'lama'", "model.family='lama' is unknown", "'llama'"),
        ("model.num_attention_heads = 0", "model.num_attention_heads=0 is less than 1", ""),
        ("model.num_key_value_heads = 3", "is not a multiple of", "divisor"),
        ("model.hidden_size = 250", "model.hidden_size=250 is not a multiple", "head_dim"),
        ("model.head_dim = 3", "head size 3 is odd", "even"),
        ("sync.bucket_mib = 0", "sync.bucket_mib=0.0 is not positive", ""),
        ("sync.name = 'all_reduce'", "sync.name='all_reduce' is unknown", "'allreduce'"),
        ("sync.every = 0", "sync.every=0 is less than 1", "1 or more"),
        ("sync.fragments = 0", "sync.fragments=0 is less than 1", "1 or more"),
        ("sync.delay = -1", "sync.delay=-1 is less than 0", "0 or more"),
        ("sync.together = -1", "sync.together=-1 is less than 0", "0 or more"),
        ("sync.outer_lr = 0", "sync.outer_lr=0.0 is not positive", ""),
        ("sync.outer_momentum = 1", "sync.outer_momentum=1.0 is not in [0, 1)", "0.9"),
        ("sync.outer_momentum = -2", "sync.outer_momentum=-2.0 is not in [0, 1)", "usual"),
        ("sync.name = 'gossip'\nsync.pull = 1.5", "would drive replicas apart", "less than 1.5"),
        ("sync.name = 'gossip'\nsync.pull = -1", "sync.pull=-1.0 is less than 0", ""),
        ("sync.name = 'gossip'\nsync.codec = 'bf16'", "gossip excludes sync.codec", "local"),
        ("sync.name = 'gossip'\nsync.delay = 1", "gossip excludes sync.delay", "local"),
        ("sync.mix = 1", "sync.mix=1.0 is not in [0, 1)", "0.5"),
        ("sync.name = 'local'\nsync.fragments = 60", "more than one a step", "sync.fragments=50"),
        ("sync.name = 'local'\nsync.delay = 50", "a fragment would leave twice", "sync.delay=49"),
        ("checkpoint.keep = 0", "checkpoint.keep=0 is less than 1", ""),
        ("run.threads = -1", "run.threads=-1 is less than 0", ""),
        ("run.name = 'a/b'", "run.name='a/b'", "quickstart"),
        ("layout = 'replicas=3'", "train.global_batch=32 is not divisible by the 3 workers", "30 or 33"),
        (
            "layout = 'replicas=2,micro_batch=3'",
            "micro_batch=3 does not divide the 16 sequences",
            "1, 2, 4, 8 or 16",
        ),
    ],
)
def test_an_option_out_of_range_is_refused(toml: str, what: str, fix: str):
    job = parse(toml)
    with pytest.raises(JobError) as caught:
        job.validate()
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.exit_code == 2


def test_a_wrong_type_given_from_python_is_refused_by_name():
    job = Job()
    with pytest.raises(JobError, match=r"optim.lr='3e-4' is not a number"):
        replace(job, optim=replace(job.optim, lr="3e-4")).validate()
    with pytest.raises(JobError, match=r"train.steps=1.5 is not a whole number"):
        replace(job, train=replace(job.train, steps=1.5)).validate()


def test_what_is_written_freely_from_python_becomes_what_it_means():
    job = Job(layout="replicas=2,fsdp=2", data=DataOptions(source="a.txt"), optim=OptimOptions(lr=1))
    valid = job.validate()
    assert valid.layout == Layout(replicas=2, fsdp=2)
    assert valid.data.source == ("a.txt",)
    assert type(valid.optim.lr) is float
    assert valid.validate() == valid
    assert parse(write(valid)) == valid
    assert Job(layout="auto").validate() == Job()
    assert job.layout == "replicas=2,fsdp=2", "the job that was given is not changed"


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"layout": "replica=2"}, "unknown layout key 'replica'"),
        ({"layout": "replicas=3"}, "not divisible by the 3 workers"),
        ({"layout": 2}, "layout=2 is not a layout"),
        ({"data": {"source": "a.txt"}}, "is not DataOptions"),
        ({"data": None}, "data=None is not DataOptions"),
        ({"data": OptimOptions()}, "is not DataOptions"),
    ],
)
def test_what_cannot_be_meant_is_refused(wrong, what: str):
    with pytest.raises(JobError) as caught:
        Job(**wrong).validate()
    assert what in caught.value.what
    assert caught.value.fix


def test_sequences_longer_than_the_context_are_refused():
    default = Job().model.max_position_embeddings
    Job(data=DataOptions(sequence_length=default)).validate()
    with pytest.raises(JobError) as caught:
        Job(data=DataOptions(sequence_length=default + 1)).validate()
    assert f"data.sequence_length={default + 1} " in caught.value.what
    assert f"max_position_embeddings={default}" in caught.value.what
    assert f"--model.max-position-embeddings {default + 1}, or take data.sequence_length={default}" in caught.value.fix
    model = ModelOptions(max_position_embeddings=4096)
    Job(model=model, data=DataOptions(sequence_length=4096)).validate()
    # With weights the context is their folder's, which is read later.
    Job(model=ModelOptions(weights="folder"), data=DataOptions(sequence_length=4096)).validate()


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 8))
def test_the_batch_that_is_proposed_would_do(batch: int, replicas: int, fsdp: int):
    layout = Layout(replicas=replicas, fsdp=fsdp)
    try:
        check_batch(batch, layout)
    except JobError as error:
        near = [int(word) for word in error.fix.split("global_batch=")[1].split(",")[0].split(" or ")]
        assert near
        for proposed in near:
            assert proposed > 0
            check_batch(proposed, layout)
            assert abs(proposed - batch) < layout.world
    else:
        assert batch % layout.world == 0


@given(st.floats(allow_nan=True) | st.integers(-(10**400), 10**400) | st.text() | st.booleans())
def test_fit_keeps_the_value_or_refuses(value):
    for kind in (int, float, str, bool):
        try:
            found = fit("x", value, kind)
        except JobError:
            assert type(value) is not kind
        else:
            assert type(found) is kind
            assert found == value or math.isnan(found)


def test_the_nearest_known_word():
    known = ["layout", "model.vocab_size", "data.vocab_size", "optim.lr", "optim.eps", "train.steps"]
    assert similar("optim.lrr", known) == ["optim.lr"]
    assert similar("train.lr", known) == ["optim.lr"]
    assert similar("vocab_size", known) == ["model.vocab_size", "data.vocab_size"]
    assert similar("otpim.lrr", known) == ["optim.lr"]
    assert similar("optim.zzz", known) == []
    assert nearest("optim.zzz", known) == "known: optim.lr, optim.eps"
    assert nearest("qqq", ["a", "b"]) == "known: a, b"


def test_the_job_starts_without_torch():
    code = "import sys, shoal, shoal.job; assert shoal.Job; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
