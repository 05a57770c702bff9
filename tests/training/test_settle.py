"""What is `auto` in a job becomes a value in the run's job.toml, which then reproduces the run."""

from __future__ import annotations

import re
import time
import types
from dataclasses import replace
from itertools import combinations, pairwise
from math import prod

import pytest

from shoal.job import Layout, parse, read
from shoal.models.spec import ParameterSpec, block_parameters, count
from shoal.observe import metrics
from shoal.training import measure, settle
from tests.equivalence.cases import DEEPSEEK, EVEN, VOCAB


def test_every_auto_is_resolved_and_the_job_reproduces_the_run(train, tiny, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    auto = {"precision": "auto", "compile": "auto", "steps": 0, "minutes": 0.1}
    schedule = {"schedule": "wsd", "decay": 0.5}
    # 6 seconds are asked for, of which 8 are kept for what follows the last step: here 10 are added.
    train(tiny(first, train=auto, optim=schedule), started=time.time() + 10)
    job = read(first / "job.toml")
    assert '"auto"' not in (first / "job.toml").read_text()
    assert job.train.precision in ("fp32", "bf16")
    assert job.train.compile in ("on", "off")
    # How many fit is a matter of the machine: one at least is always trained.
    assert job.train.steps == metrics.read(first)[-1]["step"] >= 1
    assert job.model.vocab_size == 257
    log = (first / "log.txt").read_text()
    for decided in (f"precision {job.train.precision}:", f"compile {job.train.compile}:", "steps that fit into"):
        assert decided in log
    # How often to validate and save is decided by the first estimate.
    first_guess = int(re.findall(r"what is left of 0.1 minutes: ([\d,]+)", log)[0].replace(",", ""))
    assert first_guess < 2 or f"steps that fit, by the pace so far: {job.train.steps:,}" in log
    assert job.train.validate_every == max(1, first_guess // 10)
    assert job.checkpoint.every == max(1, first_guess // 5)

    train(replace(job, run=replace(job.run, dir=str(second))))
    assert read(second / "job.toml") == job
    assert [row["loss"] for row in metrics.read(second)] == [row["loss"] for row in metrics.read(first)]


@pytest.mark.parametrize("schedule", ["zbv", "1f1b"])
def test_compiling_is_not_chosen_where_the_layout_excludes_it(monkeypatch, tiny, tmp_path, schedule):
    """Blocks that are compiled under a schedule that computes weights' gradients apart gave wrong gradients."""
    job = tiny(tmp_path, f"pipeline=2,schedule={schedule}", train={"compile": "auto"}, model={"num_hidden_layers": 4})
    monkeypatch.setattr(settle, "_compiling_pays", lambda *_: True)
    said: list[str] = []
    settled = settle.settle(job, None, [None], said.append)
    assert settled.train.compile == ("on" if schedule == "1f1b" else "off")
    assert any("apart" in line for line in said) == (schedule == "zbv")


@pytest.mark.parametrize(
    ("layout", "model", "auto"),
    [
        ("fsdp=2,tensor=2", "even", {"precision": "auto", "compile": "auto"}),
        ("expert=2,fsdp=2,pipeline=2,stages=measured", "deepseek", {"precision": "auto", "compile": "auto"}),
        ("pipeline=2,context=2,schedule=zbv,stages=measured", "even", {"compile": "auto"}),
    ],
)
def test_all_ranks_go_on_with_the_same_job_whatever_each_has_measured(ranks, layout, model, auto):
    """Also where a rank has no compiler; a rank that measured what the others do not would wait for them for ever."""
    world = Layout.parse(layout).world
    results = ranks.run("tests.training.settling:settled", world, layout=layout, model=model, chance=1, **auto)
    jobs = {result["job"] for result in results}
    assert len(jobs) == 1
    job = parse(jobs.pop())
    assert job.train.precision in (("fp32", "bf16") if "precision" in auto else ("fp64",))
    assert job.train.compile == "off"
    assert job.layout is not None
    assert len(job.layout.blocks_per_stage) == (job.layout.stage_count if "measured" in layout else 0)
    assert sum(job.layout.blocks_per_stage) in (0, job.model.num_hidden_layers)
    said = "\n".join(results[0]["said"])
    assert said.count("precision") == ("precision" in auto)
    assert ("embedding" in said) == ("measured" in layout)
    assert ("routed block" in said) == (model == "deepseek")


@pytest.mark.parametrize(
    ("layout", "auto"), [("replicas=2", {"precision": "auto"}), ("pipeline=2,stages=measured", {"precision": "fp32"})]
)
def test_ranks_that_decide_by_themselves_are_found_out(ranks, layout, auto):
    entry = "tests.training.settling:settled"
    results = [ranks.run(entry, 2, layout=layout, chance=2, bug=bug, **auto) for bug in (False, True)]
    assert [len({result["job"] for result in each}) for each in results] == [1, 2]


@pytest.mark.nightly
def test_compiling_is_measured_in_the_layout(ranks):
    """A run so long that it would repay anything."""
    train = {"precision": "fp32", "compile": "auto", "steps": 10**9}
    results = ranks.run("tests.training.settling:settled", 2, layout="tensor=2", timeout=600.0, **train)
    assert all(re.search(r"ms eager, \d+ ms compiled with 2 of 4 blocks", result["said"][0]) for result in results)
    assert results[0] == results[1]


def _elements(specs: dict[str, ParameterSpec]) -> int:
    return sum(prod(spec.shape) for spec in specs.values() if spec.learned)


def test_pieces_are_the_models_own_on_the_ranks_that_hold_them(ranks):
    first, last = ranks.run("tests.training.settling:counted", 2, layout="pipeline=2", model="deepseek")
    dense, routed = (4 * _elements(block_parameters(DEEPSEEK, layer)) for layer in (0, 1))
    embedding, norm = 4 * VOCAB * DEEPSEEK.hidden_size, 4 * DEEPSEEK.hidden_size
    whole = {"embedding": embedding, "dense block": dense, "routed block": routed, "head": embedding + norm}
    assert dict(zip(first["names"], first["bytes"], strict=True)) == whole | {"head": 0}
    assert dict(zip(last["names"], last["bytes"], strict=True)) == whole | {"embedding": 0}


def test_forward_and_backward_of_the_real_micro_batch_are_measured(ranks):
    """Counted operations: 6 a weight and token of a block; of the head the 2 of its forward, as the rest writes into
    given memory and is not counted. A step is all micro-batches through one block a stage; the last rank's is longest.
    """
    (first, last), tensors = (
        ranks.run("tests.training.settling:counted", world, layout=layout, model="even")
        for world, layout in ((2, "pipeline=2"), (4, "pipeline=2,tensor=2"))
    )
    weights = sum(prod(spec.shape) for spec in block_parameters(EVEN, 0).values() if len(spec.shape) > 1)
    block, head = (n * first["tokens"] for n in (6 * weights, 2 * VOCAB * EVEN.hidden_size))
    assert first["operations"] == [0, block, 0]
    assert last["operations"] == [0, block, head]
    assert first["step"] == last["step"] == 4 * (block + head)
    # Each tensor rank its own part, which together are the whole.
    assert [sum(each) for each in zip(*(t["operations"] for t in tensors[2:]), strict=True)] == [0, block, head]


@pytest.mark.parametrize(("layout", "model"), [("tensor=4", "even"), ("pipeline=2,tensor=2", "deepseek")])
def test_measuring_needs_no_more_memory_than_training(ranks, layout, model):
    """Where the vocabulary is most of the model, and no rank could hold all of it."""
    words = 4000
    options = replace(EVEN if model == "even" else DEEPSEEK, vocab_size=words)
    for rank in ranks.run("tests.training.settling:counted", 4, layout=layout, model=model, words=words):
        assert max(rank["bytes"]) <= rank["measured"] <= rank["trained"]
        assert rank["trained"] < 0.8 * 4 * words * options.hidden_size


@pytest.mark.parametrize(
    ("dense", "blocks", "layout", "kinds"),
    [
        (0, 30, "tensor=2", "rr"),
        (1, 30, "tensor=2", "dr"),
        (29, 30, "tensor=2", "dr"),
        (30, 30, "tensor=2", "dd"),
        (0, 1, "tensor=2", "r"),
        (3, 61, "pipeline=4", "drrr"),
        (4, 8, "pipeline=2,schedule=zbv,stages=3+2+2+1", "ddrr"),
        (1, 6, "pipeline=2,schedule=interleaved,stages=1+1+1+1+1+1", "drrrrr"),
        (1, 6, "pipeline=2,stages=measured", "dr"),
    ],
)
def test_the_measured_model_is_shallow_and_of_the_same_kinds(tiny, tmp_path, dense, blocks, layout, kinds):
    job = tiny(tmp_path, "pipeline=2")
    model = replace(DEEPSEEK, num_hidden_layers=blocks, first_k_dense_replace=dense, weights="somewhere")
    shallow = measure.shallow(replace(job, layout=Layout.parse(layout), model=model))
    assert "".join("r" if shallow.model.routes(i) else "d" for i in range(shallow.model.num_hidden_layers)) == kinds
    assert shallow.layout.stage_count in (1, len(kinds))
    assert sum(shallow.layout.blocks_per_stage) == (len(kinds) if "pipeline" in layout else 0)
    assert not shallow.model.weights
    assert shallow.model.hidden_size == DEEPSEEK.hidden_size


COSTS = {"embedding": 0.004, "dense block": 0.003, "routed block": 0.005, "head": 0.009}


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_measured_stages_are_the_best_of_all_splits(monkeypatch, tiny, tmp_path, stages):
    model = replace(DEEPSEEK, num_hidden_layers=8, first_k_dense_replace=3)
    job = replace(tiny(tmp_path), layout=Layout(pipeline=stages, stages="measured"), model=model)
    monkeypatch.setattr(measure, "pieces", lambda *_: COSTS)
    said: list[str] = []
    settled = settle.settle(job, None, [None], said.append)
    line = [COSTS["dense block"]] * 3 + [COSTS["routed block"]] * 5

    def dearest(sizes: tuple[int, ...]) -> float:
        ends = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        sums = [sum(line[a:b]) for a, b in pairwise(ends)]
        sums[0] += COSTS["embedding"]
        sums[-1] += COSTS["head"]
        return max(sums)

    splits = [tuple(b - a for a, b in pairwise((0, *ends, 8))) for ends in combinations(range(1, 8), stages - 1)]
    assert dearest(settled.layout.blocks_per_stage) == pytest.approx(min(map(dearest, splits)), rel=1e-9)
    assert max(map(dearest, splits)) > 1.5 * min(map(dearest, splits))
    costs = "embedding 4.0 ms, dense block 3.0 ms, routed block 5.0 ms, head 9.0 ms"
    assert said == [f"stages by measured cost: {settled.layout.stages} ({costs})"]
    # Nothing is left to be measured.
    monkeypatch.setattr(measure, "pieces", None)
    assert settle.settle(settled, None, [None], said.append) == settled


def test_a_run_measures_its_stages_once(train, tiny, tmp_path):
    job = tiny(tmp_path / "run", "pipeline=2,stages=measured", train={"steps": 2})
    train(job)
    found = read(tmp_path / "run" / "job.toml")
    assert found.layout.blocks_per_stage in ((1, 2), (2, 1))
    written = (tmp_path / "run" / "job.toml").read_text()
    train(job, resume=True)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("stages by measured cost") == 1
    assert f"stages by measured cost: {found.layout.stages} (embedding" in log
    assert (tmp_path / "run" / "job.toml").read_text() == written


def test_a_codec_is_chosen_for_what_a_rank_sends_and_is_in_the_runs_job(monkeypatch, train, tiny, tmp_path):
    numbers = []

    def choosing(mesh, codecs, number, say):
        numbers.append((number, codecs))
        return codecs[0]

    monkeypatch.setattr(settle, "choose", choosing)
    there = types.SimpleNamespace(layout=Layout.parse("replicas=2,fsdp=2"))
    job = tiny(tmp_path, sync={"codec": "auto"}, model={"vocab_size": 256})
    assert settle.settle(job, there, [None], print).sync.codec == "int8"
    assert numbers.pop() == (count(job.model) // 2, ["int8", "bf16"])
    # Where fewer bits are refused, or are not fed back.
    shared = replace(job, layout=Layout.parse("replicas=2,tensor=2"), sync=replace(job.sync, name="local"))
    coarse = replace(job, sync=replace(job.sync, feedback=False))
    for other in (shared, coarse):
        assert settle.settle(other, there, [None], print).sync.codec == "bf16"
    monkeypatch.undo()
    train(tiny(tmp_path / "run", "replicas=2", train={"steps": 2}, sync={"codec": "auto"}))
    assert read(tmp_path / "run/job.toml").sync.codec == "none"
    assert "codec none: all replicas are on this machine" in (tmp_path / "run/log.txt").read_text()
