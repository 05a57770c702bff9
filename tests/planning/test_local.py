"""An entry keeps what was measured, tables give back what was planted, and a step is the sum of its operations."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from shoal.errors import JobError
from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.model import ModelOptions
from shoal.job.train import TrainOptions
from shoal.models.spec import count, parameters
from shoal.planning import entry, local
from shoal.planning.entry import EXCHANGES, OPERATORS, Entry, Grid, Line, Precision, Side

# Seconds of a multiplication and addition; of nothing that counts.
MAC, NOTHING = 1e-9, 1e-25
SIDES = (16, 64, 256)
MODEL = ModelOptions(
    vocab_size=384, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
JOB = Job(
    model=MODEL, data=DataOptions(sequence_length=32), layout=Layout(),
    train=TrainOptions(steps=10, global_batch=8, precision="fp32", compile="off"),
)  # fmt: skip


def line(latency: float = 0.0, each: float = NOTHING) -> Line:
    sizes = (1e3, 1e5, 1e7)
    return Line(sizes, tuple(latency + each * size for size in sizes))


def precision(mac: float = MAC, odd: float = 1.0, between: float = NOTHING, **operators: Line) -> Precision:
    shapes = tuple((m, n, k) for m in SIDES for n in SIDES for k in SIDES)
    of_lengths = tuple((length, size) for length in (16, 64) for size in (16, 64))
    attention = Grid(of_lengths, (NOTHING,) * 4)
    return Precision(
        Grid(shapes, tuple(mac * prod(shape) for shape in shapes)), attention, attention,
        {name: line() for name in OPERATORS} | operators, odd, between, 2 * between,
    )  # fmt: skip


def machine(known: Precision, **exchanges: Line) -> Entry:
    lines = {name: line() for name in EXCHANGES} | exchanges
    sides = tuple(Side(ranks, 1, 1e-6, {"fp32": known}, lines if ranks > 1 else {}) for ranks in (1, 2, 4))
    return Entry("host", 'Linux "x"', "CPU é", "cpu", 2, 8e9, "2026-11-23", 55.5, {"torch": "2.13"}, sides)


def macs(job: Job, of: str = "") -> float:
    """Multiplications of a token's forward, by the shapes that models are made of, without attention's core."""
    shapes = {name: spec.shape for name, spec in parameters(job.model).items() if len(spec.shape) == 2 and of in name}
    found = sum(prod(shape) for shape in shapes.values())
    return found if job.model.tie_word_embeddings or of else found - prod(shapes["model.embed_tokens.weight"])


def in_layout(text: str, **train: int) -> Job:
    return replace(JOB, layout=Layout.parse(text), train=replace(JOB.train, **train))


def test_latency_and_bandwidth_are_met_exactly():
    found = Line((64.0, 4096.0, 1e6), tuple(3e-5 + 2e-10 * size for size in (64.0, 4096.0, 1e6)))
    for size in (64, 100, 5e4, 1e6, 3e7):
        assert found.at(size) == pytest.approx(3e-5 + 2e-10 * size, rel=1e-9)
    assert found.at(8) == pytest.approx(3e-5, rel=1e-3)
    assert found.at(0) == 0


def test_a_line_that_falls_never_ends_below_nothing():
    found = Line((10.0, 100.0), (2.0, 1.0))
    assert found.at(1e4) == 1.0
    assert Line((10.0,), (2.0,)).at(30) == 6.0


def test_powers_are_met_exactly_inside_the_grid_and_work_in_proportion_outside():
    shapes = tuple((m, n, k) for m in SIDES for n in SIDES for k in SIDES)
    found = Grid(shapes, tuple(1e-9 * m**0.7 * n * k**1.2 for m, n, k in shapes))
    assert found.at(100, 31, 200) == pytest.approx(1e-9 * 100**0.7 * 31 * 200**1.2)
    assert found.at(1024, 512, 256) == pytest.approx(found.at(256, 256, 256) * 8)
    assert found.at(4, 16, 16) == pytest.approx(found.at(16, 16, 16) / 4)


def test_a_corner_that_was_not_measured_has_the_rate_of_its_nearest():
    shapes = [(a, b) for a in (10, 100, 1000) for b in (10, 100, 1000)]
    shapes.remove((1000, 1000))
    seconds = tuple((3e-9 if max(shape) == 1000 else 1e-9) * prod(shape) for shape in shapes)
    assert Grid(tuple(shapes), seconds).at(1000, 1000) == pytest.approx(3e-3)


def test_an_entry_is_read_as_it_was_written(tmp_path: Path):
    made = machine(precision(odd=1.25))
    path = tmp_path / "machine.toml"
    path.write_text(entry.write(made), encoding="utf-8")
    assert entry.read(path) == made


@pytest.mark.parametrize(
    ("old", "new", "what", "where"),
    [
        ("version = 1", "version = 9", "version is 9, and this shoal reads 1", ":10"),
        ("version = 1", "", "version is None", ".toml"),
        ("cores = 2", 'cores = "two"', "Expected `int`, got `str`", ":6"),
        ("machine =", "machine", "not valid TOML", ":2"),
        ("norm.backward", "nrm.backward", "operators lack norm.backward", ":"),
        ("launch = 1e-06", "", "missing required field `launch`", ":"),
        ("[1000.0, 100000.0, 10000000.0]", "[1000.0, 100.0, 10000000.0]", "sizes do not rise", ":"),
        ("seconds = [1e-22,", "seconds = [0.0,", "a time is not positive", ":"),
        ("seconds = [1e-22,", "seconds = [", "3 sizes and 2 times", ":"),
        ('"message"]', '"letter"]', "exchanges lack message", ":"),
    ],
)
def test_a_bad_entry(tmp_path: Path, old: str, new: str, what: str, where: str):
    text = entry.write(machine(precision()))
    path = tmp_path / "machine.toml"
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(JobError) as caught:
        entry.read(path)
    assert what in caught.value.what
    assert caught.value.where.startswith(str(path))
    assert where in caught.value.where
    assert caught.value.fix


def test_no_entry(tmp_path: Path):
    with pytest.raises(JobError, match="no entry") as caught:
        entry.read(tmp_path / "machine.toml")
    assert "shoal calibrate" in caught.value.fix


@pytest.mark.parametrize(
    ("layout", "share", "again"),
    [
        ("replicas=1", 1, 0), ("replicas=1,micro_batch=2", 1, 0), ("replicas=2", 2, 0), ("fsdp=2", 2, 0),
        ("tensor=2", 2, 0), ("replicas=2,tensor=2", 4, 0), ("replicas=1,recompute=block", 1, 1),
    ],
)  # fmt: skip
def test_products_are_those_of_all_weights_and_tokens(layout: str, share: int, again: int):
    job = in_layout(layout)
    found = local.predict(job, machine(precision()))
    tokens = JOB.train.global_batch * JOB.data.sequence_length
    expected = MAC * tokens * (3 * macs(job) + again * macs(job, "layers")) / share
    assert found.seconds == pytest.approx(expected)
    assert found.parts["products"] == pytest.approx(expected)
    assert set(found.parts) == set(local.PARTS)


def test_of_a_pipeline_the_bubble_is_what_ranks_wait():
    """Two stages of equal cost in GPipe: the first micro-batch's time on the other stage is waited for."""
    job = in_layout("pipeline=2,micro_batch=1,schedule=gpipe,stages=3+1")
    layers = macs(job, "layers") / 4
    first, last = 3 * layers, layers + macs(job) - 4 * layers
    found = local.predict(job, machine(precision()))
    steps = [3 * JOB.data.sequence_length * MAC * cost for cost in (first, last)]
    assert found.seconds == pytest.approx(8 * max(steps) + min(steps))
    assert found.parts["bubble"] == pytest.approx(min(steps))
    assert sum(found.parts.values()) == pytest.approx(found.seconds)


def test_odd_sizes_and_what_lies_between_operators_are_added():
    even = local.predict(JOB, machine(precision())).seconds
    slow = local.predict(JOB, machine(precision(odd=3.0))).seconds
    assert slow == pytest.approx(even)
    job = replace(JOB, model=replace(MODEL, intermediate_size=161))
    ratio = local.predict(job, machine(precision(odd=3.0))).seconds / local.predict(job, machine(precision())).seconds
    assert 1.2 < ratio < 3
    tiny = 16 * (4 * 64 * 64 + 3 * 64 * 128) * MAC
    found = local.predict(in_layout("replicas=1,micro_batch=4"), machine(precision(between=1.0)))
    assert found.parts["launch"] == pytest.approx(2 * 4 * (1.0 - tiny + 2.0 - 2 * tiny))


@pytest.mark.parametrize(
    ("layout", "kind", "calls", "size"),
    [
        # One bucket, and two small sums.
        ("replicas=2", "all_reduce", 3, 4 * count(MODEL) + 128),
        ("replicas=2,micro_batch=1", "all_reduce", 3, 4 * count(MODEL) + 128),
        ("fsdp=2,zero=3,micro_batch=2", "reduce_scatter", 2 * 5, 2 * 4 * count(MODEL)),
        ("fsdp=2,zero=1,micro_batch=2", "reduce_scatter", 5, 4 * count(MODEL)),
        ("fsdp=2,zero=1,micro_batch=2", "all_gather", 5, 4 * count(MODEL)),
        # Twice a block forward and backward, and once each with the embedding and the output layer.
        ("tensor=2,micro_batch=8", "reduce_scatter", 4 * 4 + 2, 18 * 4 * 8 * 32 * 64),
    ],
)
def test_what_ranks_exchange(layout: str, kind: str, calls: int, size: int):
    latency, each = 1e-3, 1e-8
    found = local.predict(in_layout(layout), machine(precision(mac=NOTHING), **{kind: line(latency, each)}))
    assert found.parts["exchange"] == pytest.approx(calls * latency + each * size, rel=1e-6)


def test_gradients_leave_in_buckets():
    """A quarter of a MiB each, the last one less."""
    job = replace(in_layout("replicas=2"), sync=replace(JOB.sync, bucket_mib=0.25))
    buckets = -(-4 * count(MODEL) // 2**18)
    assert buckets > 2
    known = machine(precision(mac=NOTHING), all_reduce=line(1e-3))
    assert local.predict(job, known).parts["exchange"] == pytest.approx(1e-3 * (buckets + 2))


def test_the_update_is_of_what_a_rank_has():
    known = machine(precision(mac=NOTHING, update=line(0.0, 1e-8)))
    whole = local.predict(in_layout("replicas=2"), known).parts["update"]
    assert whole == pytest.approx(1e-8 * count(MODEL))
    assert local.predict(in_layout("fsdp=2,zero=1"), known).parts["update"] == pytest.approx(whole / 2)


@pytest.mark.parametrize(
    ("job", "what"),
    [
        (in_layout("context=2"), "layout context=2"),
        (in_layout("replicas=8"), "measured with 1, 2, 4 ranks, not with 8"),
        (replace(JOB, train=replace(JOB.train, precision="bf16")), "bf16 was not measured"),
        (replace(JOB, run=replace(JOB.run, threads=2)), "run.threads=2"),
        (replace(JOB, optim=replace(JOB.optim, name="sgd")), "optim.name=sgd"),
        (replace(JOB, train=replace(JOB.train, compile="on")), "train.compile=on"),
    ],
)
def test_what_tables_do_not_know_is_refused(job: Job, what: str):
    with pytest.raises(JobError) as caught:
        local.predict(job, machine(precision()))
    assert what in caught.value.what
    assert caught.value.fix
