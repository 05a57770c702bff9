"""A machine that was measured is planned: all layouts, the fastest first, what fits, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import shoal
from shoal.cli.main import main
from shoal.errors import JobError
from shoal.job import Layout, read, write
from shoal.planning import entry, here, kept, local
from shoal.planning.asked import Wanted
from shoal.planning.plan import CALLED
from tests.planning.test_local import JOB, MAC, line, machine, precision

OPEN = replace(JOB, layout=None, train=replace(JOB.train, precision="auto", compile="auto"))
SLOW = {name: line(1.0) for name in entry.EXCHANGES}
"""Exchanges of a second each."""


def made(cores: int = 4, memory: float = 8e9, bf16: float = 0.0, **exchanges) -> entry.Entry:
    """bf16: seconds of a multiplication there, 0 where it was not measured."""
    known = machine(precision(), **exchanges)
    sides = known.sides
    if bf16:
        sides = tuple(replace(s, precisions={**s.precisions, "bf16": precision(bf16)}) for s in sides)
    return replace(known, cores=cores, memory=memory, sides=sides)


def answer(known: entry.Entry, job=OPEN, best: int = 100, alike: bool = True, **wanted):
    question, settled = here.question(job, known, Wanted(**wanted))
    return here.plans(question, settled, known, best, alike)


def test_all_layouts_each_as_it_is_predicted_the_fastest_first():
    known = made(all_reduce=line(1e-4))
    plans = answer(known).plans
    seconds = [plan.seconds for plan in plans]
    assert seconds[1:] == sorted(seconds[1:])
    assert seconds[0] <= 1.0051 * min(seconds)
    assert len({plan.layout for plan in plans}) == len(plans)
    for text in ("replicas=4", "replicas=1,micro_batch=4", "fsdp=2,zero=1", "tensor=2", "pipeline=4", "replicas=2"):
        assert Layout.parse(text) in {plan.layout for plan in plans}
    for plan in plans:
        job = replace(JOB, layout=plan.layout)
        step = local.predict(job, known)
        assert plan.seconds == step.seconds
        assert plan.parts == step.parts
        assert sum(plan.parts.values()) == pytest.approx(plan.seconds)
        assert set(plan.parts) <= set(CALLED)
        assert plan.memory == kept.predict(job, here.PROCESS)
        assert plan.capacity == known.memory / plan.layout.world
        assert plan.tokens_per_second == pytest.approx(8 * 32 / plan.seconds)
        assert plan.per_device == pytest.approx(plan.tokens_per_second / plan.layout.world)
        assert plan.low < plan.high


def test_the_share_of_the_peak_is_of_the_fastest_product():
    """Nothing but products takes time, at one rate: four ranks have all of it, one of four has a quarter."""
    known, flops = made(), 2 / MAC
    for plan in answer(known).plans:
        question, _ = here.question(OPEN, known, Wanted())
        each = question.shape.flops_per_token(32)
        assert plan.mfu == pytest.approx(each * 8 * 32 / plan.seconds / (4 * flops))


def test_equal_layouts_give_way_to_the_simpler():
    assert answer(made(**SLOW)).plans[0].layout == Layout()


def test_no_more_ranks_than_cores():
    """Short calls of more ranks than cores know nothing of waiting for one."""
    worlds = {plan.layout.world for plan in answer(made(cores=2)).plans}
    assert worlds == {1, 2}


def test_auto_becomes_the_faster_precision():
    for bf16, chosen in ((MAC / 2, "bf16"), (MAC * 2, "fp32"), (0.0, "fp32")):
        question, job = here.question(OPEN, made(bf16=bf16), Wanted())
        assert (question.precision, job.train.precision, job.train.compile) == (chosen, chosen, "off")
    assert here.question(OPEN, made(bf16=MAC / 2), Wanted(precision="fp32"))[0].precision == "fp32"


def test_what_memory_does_not_hold_is_computed_again_or_left_out():
    """A large batch: of one rank's micro-batch of all of it neither keeps its activations in so little memory."""
    job = replace(OPEN, train=replace(OPEN.train, global_batch=512, precision="fp32"))
    alone = replace(JOB, train=replace(JOB.train, global_batch=512))
    keeps, again = (
        sum(kept.predict(replace(alone, layout=Layout(recompute=how)), here.PROCESS).values())
        for how in ("none", "block")
    )
    assert again < keeps
    plans = answer(made(cores=1, memory=1.05 * keeps), job).plans  # a tenth to spare is asked for
    assert Layout(recompute="block") in {plan.layout for plan in plans}
    assert Layout() not in {plan.layout for plan in plans}
    with pytest.raises(JobError, match="GiB of a rank, and the machine has"):
        answer(made(cores=1, memory=here.PROCESS), job)


def test_replicas_and_sizes_that_are_asked_for():
    found = answer(made(), replicas=2)
    assert {plan.layout.replicas for plan in found.plans} == {2}
    with pytest.raises(JobError, match="3 replicas"):
        answer(made(), replicas=3)
    question, job = here.question(OPEN, made(), Wanted(sequence=64, global_batch=16, tokens="1M"))
    assert (job.data.sequence_length, job.train.global_batch) == (64, 16)
    plan = here.plans(question, job, made(), 1).plans[0]
    assert plan.days == pytest.approx(1e6 / plan.tokens_per_second / 86400)


def test_memory_of_gpus_is_not_predicted():
    plan = answer(replace(made(), kind="cuda", cores=64)).plans[0]
    assert plan.memory == {}
    assert plan.layout.world == 4


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """(a job, an entry), which is this machine's."""
    job, file = tmp_path / "job.toml", tmp_path / "shoal" / "machine.toml"
    job.write_text("# mine\n" + write(OPEN))
    file.parent.mkdir()
    file.write_text(entry.write(made(bf16=MAC / 2)), encoding="utf-8")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return str(job), str(file)


def test_the_command(files: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture):
    job, file = files
    assert main(["plan", job, "--cluster", file, "--explain"]) == 0
    text = capsys.readouterr().out
    for words in ("on host: 4 cores of CPU é", "What takes most: ", "with 1, 2, 4 ranks", "memory of the fullest"):
        assert words in text
    assert main(["plan", job, "--cluster", "here", "--format", "json", "--best", "3"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert len(plans) == 3
    assert all(math.isfinite(plan["mfu"]) and plan["memory_gib"] > 0 for plan in plans)
    assert shoal.plan(read(job), "here").plans[0].layout == Layout.parse(plans[0]["layout"])
    new = tmp_path / "new.toml"
    assert main(["plan", job, "--cluster", "here", "--out", str(new)]) == 0
    assert str(read(new).layout) == plans[0]["layout"]
    assert read(new).train.precision == "auto"
    assert new.read_text().startswith("# mine\n")


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["--what-if", "devices=2x"], "--what-if: a measured machine is what it is"),
        (["--price", "2"], "--price: a measured machine is what it is"),
        (["--precision", "fp8"], "train.precision='fp8'"),
        (["--sync", "local"], "sync.name=local: steps on this machine are predicted without"),
        (["--best", "0"], "--best=0 is less than 1"),
        (["--replicas", "-1"], "--replicas=-1 is less than 0"),
        (["--sequence", "-3"], "-3"),
        (["--tokens", "many"], "--tokens=many is no number"),
    ],
)
def test_mistakes(files: tuple[str, str], capsys: pytest.CaptureFixture, args: list[str], what: str):
    assert main(["plan", files[0], "--cluster", "here", *args]) == 2
    said = capsys.readouterr()
    assert what in said.err
    assert not said.out


def test_a_model_by_name_and_no_entry(files: tuple[str, str], capsys: pytest.CaptureFixture):
    assert main(["plan", "--model", "llama3-8b", "--cluster", "here"]) == 2
    assert "a measured machine is planned for a job" in capsys.readouterr().err
    with pytest.raises(JobError, match="for a job"):
        shoal.plan("llama3-8b", "here")
    Path(files[1]).unlink()
    assert main(["plan", files[0], "--cluster", "here"]) == 2
    assert "shoal calibrate writes one" in capsys.readouterr().err
