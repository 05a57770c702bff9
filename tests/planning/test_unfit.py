"""Where nothing fits: what is said, and that what is proposed does fit. By a search whose memory is plain."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from shoal.errors import JobError
from shoal.planning import asked, cluster, devices, unfit
from shoal.planning.asked import Wanted
from shoal.planning.plan import Answer, Question
from tests.planning import plans


@pytest.fixture(autouse=True)
def a_plain_search(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(unfit, "search", plans.search)


def refusal(question: Question) -> JobError:
    return unfit.refusal(question, plans.search(question))


def asking(model: str, where: str, **wanted) -> Question:
    return asked.of_model(model, cluster.named(where), Wanted(**wanted))


def test_how_far_the_nearest_is():
    question = asking("llama3-405b", "h100x8")
    said = refusal(question).what
    assert "llama3-405b fits in no layout on h100x8: the nearest, fsdp=8" in said
    gib = float(re.search(r"needs ([\d.]+) GiB", said)[1])
    assert gib == pytest.approx(1.1 * plans.search(question).nearest.total / 2**30, rel=1e-3)
    assert "h100 has 80" in said
    assert "most of it is weights" in said


def test_the_smallest_cluster_fits_and_no_smaller_one_does():
    question = asking("llama3-405b", "h100x8", global_batch=9600)
    count = int(re.match(r"(\d+) h100 would do", refusal(question).fix)[1])

    def fits(nodes: int) -> bool:
        return bool(plans.search(replace(question, cluster=cluster.named(f"h100x{8 * nodes}"))).plans)

    assert fits(count // 8)
    assert not any(fits(nodes) for nodes in range(1, count // 8))


def test_part_of_a_node_becomes_more_of_it():
    fix = refusal(asking("llama2-13b", "a10gx1", sequence=1024, global_batch=64)).fix
    assert fix.startswith("2 a10g would do")


def test_a_rack_is_taken_to_the_trays_that_a_layout_can_share():
    fix = refusal(asking("llama3-405b", "gb200x64")).fix
    assert fix.startswith("128 gb200 would do")


def test_a_device_with_more_memory_is_of_the_same_maker():
    question = asking("llama3-405b", "h100x8")
    name = re.search(r"as many (\S+) \(", refusal(question).fix)[1]
    assert devices.device(name).vendor == "NVIDIA"
    assert plans.search(replace(question, cluster=cluster.named(f"{name}x8"))).plans


def test_a_shorter_sequence():
    question = asking("llama3-8b", "h100x8", sequence=2**20, global_batch=8)
    fix = refusal(question).fix
    length = int(re.search(r"--sequence (\d+)", fix)[1])
    assert length < 2**20
    assert plans.search(replace(question, sequence=length)).plans
    assert not plans.search(replace(question, sequence=2 * length)).plans


def test_what_no_layout_can_share():
    said = refusal(asking("llama3-8b", "h100x7", global_batch=8))
    assert "no layout of 7 devices" in said.what
    assert said.fix.startswith("--global-batch 7; or 8 h100 would do")


def test_what_nothing_helps():
    question = asking("llama3-8b", "h100x8", sequence=2**26 - 1, global_batch=8)
    assert refusal(question).fix.startswith("a smaller model")


def test_where_one_change_alone_is_not_enough(monkeypatch: pytest.MonkeyPatch):
    """With 40 GiB or less nothing fits, and what does needs two devices or more."""

    def search(question: Question, best: int = 10, alike: bool = True) -> Answer:
        (pool,) = question.cluster.pools
        found = plans.plan("replicas=1", 1.0, gib=60.0, capacity=pool.device.memory / 2**30)
        fits = pool.device.memory > 40 * 2**30 and pool.count > 1
        return Answer((found,) if fits else (), 0.0, 1, int(fits), None if fits else found)

    monkeypatch.setattr(unfit, "search", search)
    fix = refusal(asking("llama3-8b", "l4x1")).fix
    count, name = re.fullmatch(r"(\d+) (\S+) would do \(\d+ GiB each\)", fix).groups()
    assert (int(count), devices.device(name).vendor) == (2, "NVIDIA")
    assert devices.device(name).memory > 40 * 2**30
