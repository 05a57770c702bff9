"""What is asked of the planner where little is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.job import Job, read
from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions
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
        (Wanted(replicas=3), "--replicas=3 does not divide the 8 devices"),
        (Wanted(replicas=-1), "--replicas=-1 is less than 0"),
        (Wanted(sync=SyncOptions("allreduce", "powersgd:4")), "sync.codec=powersgd:4: how long"),
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


def test_a_job_s_own_sync_is_planned():
    own = SyncOptions("local", "bf16", every=500)
    job = replace(Job(), model=replace(Job().model, vocab_size=500), sync=own)
    assert asked.of_job(job, cluster.named("h100x8"), Wanted()).sync == own
    assert asked.of_model("gpt2", cluster.named("h100x8"), Wanted()).sync == SyncOptions()


def test_another_sync_than_the_job_s():
    """What is not said stays the job's, but what has no effect any more."""
    job = replace(Job(), sync=SyncOptions("local", "int8", every=500, fragments=4))
    kept = asked.synced(job, {"name": "", "codec": "", "every": 0, "fragments": 0}, {"shards": 0, "mode": ""})
    assert kept == job
    slower = asked.synced(job, {"every": 100, "codec": "bf16"}, {})
    assert slower.sync == SyncOptions("local", "bf16", every=100, fragments=4)
    assert asked.synced(job, {"name": "allreduce"}, {}).sync == SyncOptions("allreduce", "int8")
    served = asked.synced(job, {"name": "server", "codec": "none"}, {"shards": 3, "mode": "asp"})
    assert (served.sync, served.server) == (SyncOptions("server"), ServerOptions(shards=3, mode="asp"))
    rounds = asked.synced(replace(served, server=replace(served.server, max_staleness=4)), {}, {"mode": "bsp"})
    assert rounds.server == ServerOptions(shards=3)
    assert asked.synced(rounds, {"name": "allreduce"}, {}).server == ServerOptions()


@pytest.mark.parametrize(
    ("sync", "server", "what"),
    [
        ({"every": 5}, {}, "sync.every=5 has no effect with sync.name=allreduce"),
        ({}, {"shards": 2}, "server.shards=2 has no effect with sync.name=allreduce"),
        ({"name": "lokal"}, {}, "sync.name='lokal' is unknown"),
        ({"name": "local", "codec": "int9"}, {}, "'int9' is unknown"),
        ({"name": "local", "delay": 60}, {}, "sync.delay=60 is not less than"),
        ({"name": "server"}, {"mode": "async"}, "server.mode='async' is unknown"),
        ({"name": "server"}, {"shards": -1}, "server.shards=-1 is less than 1"),
    ],
)
def test_syncs_that_cannot_be(sync: dict, server: dict, what: str):
    with pytest.raises(JobError) as refused:
        asked.synced(Job(), sync, server)
    assert what in refused.value.what
    assert refused.value.fix
