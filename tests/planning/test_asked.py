"""What is asked of the planner where little is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.job import Job, read
from shoal.models import spec
from shoal.planning import asked, cluster
from shoal.planning.asked import Wanted

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("parameters", "sequence", "devices", "batch"),
    [
        (8e9, 8192, 64, 512),  # 4 Mi tokens
        (405e9, 8192, 16384, 2048),  # 16 Mi, as Llama 3 405B's
        (1.2e8, 1024, 8, 512),  # half a Mi
        (8e9, 8192, 24, 384),  # 3 × 128: nearest to 512 with the devices' odd factor
        (8e9, 8192, 1001, 1001),
    ],
)
def test_the_usual_batch(parameters: float, sequence: int, devices: int, batch: int):
    assert asked.usual_batch(parameters, sequence, devices) == batch


@pytest.mark.parametrize(
    ("text", "tokens"), [("15T", 15e12), ("1.5b", 1.5e9), ("2e9", 2e9), ("300 B", 3e11), ("", None)]
)
def test_tokens(text: str, tokens: float | None):
    assert asked.tokens_of(text) == tokens


@pytest.mark.parametrize("text", ["many", "-1T", "0", "5", "1e400", "15TB"])
def test_no_tokens(text: str):
    with pytest.raises(JobError, match="tokens"):
        asked.tokens_of(text)


def test_a_model_by_name_has_its_usual_sequence():
    question = asked.of_model("llama3-8b", cluster.named("h100x64"), Wanted())
    assert (question.sequence, question.global_batch, question.precision) == (8192, 512, "bf16")
    other = asked.of_model("llama3-8b", cluster.named("h100x64"), Wanted(4096, 96, "fp8", "1T"))
    assert (other.sequence, other.global_batch, other.precision, other.tokens) == (4096, 96, "fp8", 1e12)


def test_a_job_says_what_is_not_given():
    job = read(ROOT / "recipes" / "quickstart.toml")
    question = asked.of_job(job, cluster.named("h100x8"), Wanted(global_batch=128))
    assert (question.sequence, question.global_batch, question.precision) == (64, 128, "bf16")
    assert question.shape.parameters == spec.count(replace(job.model, vocab_size=4096))
    exact = replace(job, train=replace(job.train, precision="fp32"))
    with pytest.raises(JobError, match="fp32: no speed"):
        asked.of_job(exact, cluster.named("h100x8"), Wanted())
    assert asked.of_job(exact, cluster.named("h100x8"), Wanted(precision="bf16")).precision == "bf16"


def test_a_vocabulary_of_bytes():
    job = Job()
    job = replace(job, data=replace(job.data, tokenizer="bytes"))
    assert asked.shape_of(job).vocab == 257


@pytest.mark.parametrize(
    ("wanted", "what"),
    [
        (Wanted(sequence=-1), "--sequence=-1 is less than 0"),
        (Wanted(global_batch=10**12), "--global-batch=1000000000000 is more than"),
        (Wanted(precision="bf61"), "--precision='bf61' is unknown"),
        (Wanted(sequence=4096), "more than the 1024 positions that gpt2 has learned"),
    ],
)
def test_absurd_sizes(wanted: Wanted, what: str):
    with pytest.raises(JobError) as refused:
        asked.of_model("gpt2", cluster.named("h100x8"), wanted)
    assert what in refused.value.what


def test_fp8_is_for_devices_that_have_it():
    with pytest.raises(JobError, match="a100-80 has no peak in fp8"):
        asked.of_model("llama3-8b", cluster.named("a100-80x8"), Wanted(precision="fp8"))


def test_doubles_have_no_speed():
    job = replace(Job(), train=replace(Job().train, precision="fp64"))
    with pytest.raises(JobError, match=r"train\.precision=fp64"):
        asked.of_job(job, cluster.named("h100x8"), Wanted())


def test_a_price_goes_over_the_file_s(tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text('[pool.a]\ndevice = "h100"\ncount = 8\nprice = 2.0\n')
    assert asked.cluster_of(str(file), 0.0).price == 16
    assert asked.cluster_of(str(file), 3.0).price == 24
    assert asked.cluster_of("h100x8", 0.0).price is None
    with pytest.raises(JobError, match="--price=-1"):
        asked.cluster_of("h100x8", -1.0)
