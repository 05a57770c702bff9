"""The search: it knows all that a job may have and no more, its bounds hold, and it finds what trying all finds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

import shoal
from shoal.errors import JobError
from shoal.job import Job, Layout
from shoal.job.fits import check_layout, check_model
from shoal.job.layout import SCHEDULES
from shoal.job.model import ModelOptions
from shoal.job.server import ServerOptions
from shoal.job.sync import SyncOptions
from shoal.planning import asked, candidates, cluster, memory, piped, search, shapes, step, syncs, timeline
from shoal.planning import scene as scenes
from shoal.planning.asked import Wanted
from shoal.planning.constants import Rates
from shoal.planning.plan import Question

# Sizes that many degrees do not divide.
SEQUENCE = 40
DENSE = ModelOptions(
    hidden_size=96, intermediate_size=160, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2,
    vocab_size=500,
)  # fmt: skip
ROUTED = replace(
    DENSE, num_hidden_layers=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, family="qwen3_moe"
)


CODED = SyncOptions("local", "int8")


def asking(model: ModelOptions, devices: int, batch: int, **more) -> Question:
    where = cluster.named(f"h100x{devices}")
    return Question(shapes.of_options(model), where, sequence=SEQUENCE, global_batch=batch, **more)


def allowed(model: ModelOptions, layout: Layout, batch: int, sync: SyncOptions) -> bool:
    try:
        layout.validate()
        job = replace(Job(), model=model, layout=layout, train=replace(Job().train, global_batch=batch), sync=sync)
        check_layout(job)
        check_model(model, SEQUENCE, layout)
    except JobError:
        return False
    return True


def tried(question: Question) -> list[Layout]:
    """All candidates of a question."""
    bases = candidates.bases(question)
    return [
        bases.layout(number, fsdp, zero, question.shape.layers)
        for number in range(len(bases))
        for fsdp, zero in candidates.splits(bases, number, question)
    ]


def every(model: ModelOptions, devices: int, batch: int, sync: SyncOptions) -> set[Layout]:
    """All layouts that a job may have, found by asking of each combination of numbers."""
    degrees = [n for n in range(1, devices + 1) if devices % n == 0]
    found = set()
    for r, p, f, c, t in product(degrees, repeat=5):
        if r * p * f * c * t != devices:
            continue
        for e, micro, zero, recompute in product(range(1, 5), range(1, 17), (1, 2, 3), ("none", "block")):
            if f * c == 1 and zero != 3:
                continue
            plain = Layout(
                r, "", p, f, c, t, expert=e, zero=zero, micro_batch=micro, recompute=recompute
            )  # fmt: skip
            if p == 1:
                found.add(plain) if allowed(model, plain, batch, sync) else None
                continue
            for schedule, chunks in product(SCHEDULES, range(1, 9)):
                usual = chunks == SCHEDULES[schedule]
                if p * chunks <= model.num_hidden_layers:
                    each, more = divmod(model.num_hidden_layers, p * chunks)
                    stages = "" if usual else "+".join(str(each + (n < more)) for n in range(p * chunks))
                    layout = replace(plain, schedule=schedule, stages=stages)
                    found.add(layout) if allowed(model, layout, batch, sync) else None
    return found


@pytest.fixture
def short_contexts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(candidates, "POSITIONS", 1)


@pytest.mark.parametrize(
    ("model", "devices", "batch"), [(DENSE, 4, 24), (DENSE, 6, 12), (ROUTED, 4, 16), (ROUTED, 6, 18)]
)
@pytest.mark.usefixtures("short_contexts")
def test_all_that_a_job_may_have_are_tried(model: ModelOptions, devices: int, batch: int):
    found = tried(asking(model, devices, batch))
    assert len(found) == len(set(found))
    wanted = every(model, devices, batch, SyncOptions())
    assert set(found) == wanted
    assert len(found) > 100
    # And as many replicas as are asked for.
    two = tried(asking(model, devices, batch, replicas=2))
    assert set(two) == {layout for layout in wanted if layout.replicas == 2}
    assert len(two) == len(set(two))


@pytest.mark.parametrize("model", [DENSE, ROUTED])
@pytest.mark.usefixtures("short_contexts")
def test_what_a_sync_excludes_is_not_tried(model: ModelOptions):
    """Local steps with a codec: no two ranks of a replica have the same weights."""
    found = tried(asking(model, 4, 24, sync=CODED))
    assert set(found) == every(model, 4, 24, CODED)
    assert len(found) == len(set(found)) > 5
    two = tried(asking(model, 4, 24, sync=CODED, replicas=4))
    assert set(two) == {layout for layout in found if layout.replicas == 4}


def test_none_is_tried_twice_and_none_that_fits_refuses():
    """Of a large cluster, some at random."""
    question = asked.of_model("deepseek-v3", cluster.named("h100x2048"), Wanted())
    bases, draws = candidates.bases(question), np.random.default_rng(0)
    assert len(bases) > 10_000
    for number in draws.choice(len(bases), 300, replace=False):
        for fsdp, zero in candidates.splits(bases, int(number), question):
            layout = bases.layout(int(number), fsdp, zero, question.shape.layers)
            layout.validate()
            assert layout.world == 2048
            check_layout(replace(Job(), layout=layout, train=replace(Job().train, global_batch=question.global_batch)))


ASP, BSP = ServerOptions(shards=3, mode="asp"), ServerOptions(shards=2)
CASES = [
    ("llama3-8b", "h100x8", Wanted(sequence=4096, global_batch=32)),
    ("llama3-8b", "l4x16", Wanted(sequence=2048, global_batch=64)),
    ("llama2-13b", "a100-40x16", Wanted(sequence=4096, global_batch=48)),
    ("llama3-70b", "h100x64", Wanted(global_batch=64)),
    ("mixtral-8x7b", "h100x32", Wanted(sequence=4096, global_batch=64)),
    ("qwen3-30b-a3b", "a100-80x16", Wanted(sequence=4096, global_batch=32, precision="bf16")),
    ("llama2-7b", "h100x8", Wanted(sequence=4096, global_batch=16, precision="fp8")),
    ("llama3-70b", "h100x8", Wanted(global_batch=32)),  # fits in none
    ("llama3-8b", "h100x16", Wanted(sequence=4096, global_batch=32, sync=SyncOptions("allreduce", "int8"), replicas=4)),
    ("llama3-8b", "h100x16", Wanted(sequence=4096, global_batch=32, sync=SyncOptions("local", every=5), replicas=2)),
    ("qwen3-30b-a3b", "h100x16", Wanted(sequence=4096, global_batch=32, sync=SyncOptions("local", "int8", every=5))),
    ("llama3-8b", "l4x16", Wanted(sequence=2048, global_batch=64, sync=SyncOptions("gossip", every=3))),
    ("llama3-8b", "l4x8", Wanted(sequence=2048, global_batch=64, sync=SyncOptions("server", "int8"), server=ASP)),
    ("llama3-8b", "h100x16", Wanted(sequence=4096, global_batch=32, sync=SyncOptions("server"), server=BSP)),
]


def all_computed(space: search.Space) -> list[list[search.Split]]:
    """Of each base every split, in full: no leaf, no bound, each candidate for itself."""
    splits = [candidates.splits(space.bases, base, space.question) for base in range(len(space.bases))]
    which = np.repeat(np.arange(len(splits)), [len(some) for some in splits])
    fsdp, zero = np.array([pair for some in splits for pair in some]).T
    found: list[list[search.Split]] = [[] for _ in splits]
    for number, schedule in enumerate(candidates.NAMES):
        rows = np.flatnonzero(space.bases.schedule[which] == number)
        if len(rows):
            many, _ = space.work(which[rows], fsdp[rows], zero[rows])
            alone = step.cost(many, space.known, schedule)
            rates = Rates.of(space.known, many)
            seconds = syncs.exchanged(alone, many, space.known, rates, space.question).seconds
            total = memory.cost(many, schedule).total("device", space.pool.device.memory)
            for n, row in enumerate(rows):
                one = search.Split(int(which[row]), int(fsdp[row]), int(zero[row]), float(seconds[n]), float(total[n]))
                found[which[row]].append(one)
    return found


@pytest.mark.parametrize(("model", "where", "wanted"), CASES)
def test_it_finds_what_trying_all_finds(model: str, where: str, wanted: Wanted, monkeypatch: pytest.MonkeyPatch):
    """In small portions, so that where it stops is seen."""
    monkeypatch.setattr(search, "_BLOCK", 1 if where == "h100x8" else 4)
    monkeypatch.setattr(search, "_RANKED", 20)
    # Bounds are those of the closed forms, by which the fastest are found before some are simulated.
    monkeypatch.setattr(search.Space, "simulated", lambda space, found: found)
    question = asked.of_model(model, cluster.named(where), wanted)
    space = search.Space(question)
    computed = all_computed(space)
    assert space.size == sum(map(len, computed))
    # No candidate is under its base's bounds.
    seconds, total = space._bounds
    for base, splits in enumerate(computed):
        assert all(one.seconds >= seconds[base] * (1 - 1e-12) for one in splits)
        assert all(one.total >= total[base] * (1 - 1e-12) for one in splits)
    capacity = space.pool.device.memory
    fitting = [[one for one in splits if one.total * 1.1 <= capacity] for splits in computed]
    found = search.search(question, best=20)
    if not any(fitting):
        least = min(one.total for splits in computed for one in splits)
        assert found.plans == ()
        assert found.nearest.total == pytest.approx(least)
        return
    assert found.compared > 0
    least = sorted(min(one.seconds for one in splits) for splits in fitting if splits)
    # Each of another base; the n-th is as fast as the n-th fastest base, but for what counts as equal.
    for plan, best in zip(found.plans, least, strict=False):
        assert plan.seconds == pytest.approx(best, rel=2 * 0.0051)
    assert len(found.plans) == min(20, len(least))
    assert found.plans[0].seconds <= least[0] * 1.0051**2
    known = {
        space.bases.layout(one.base, one.fsdp, one.zero, question.shape.layers): one
        for splits in fitting
        for one in splits
    }
    for plan in found.plans:
        one = known[plan.layout]
        assert plan.seconds == pytest.approx(one.seconds, rel=1e-9)
        assert plan.total == pytest.approx(one.total, rel=1e-9)


def test_schedules_without_an_exact_closed_form_are_simulated(monkeypatch: pytest.MonkeyPatch):
    """Each as the whole schedule takes, operation by operation; and those that there is no time for as before."""
    question = asked.of_model("llama3-8b", cluster.named("h100x16"), Wanted(global_batch=256))
    space = search.Space(question)
    found, _ = space.fastest(100)
    after = space.simulated(found)
    changed = [(one, other) for one, other in zip(found, after, strict=True) if one is not other]
    assert {space._case(one).schedule for one, _ in changed} == set(piped.SIMULATED)
    for one, other in changed:
        plan = space.plan(other)
        scene = scenes.staged(question, replace(plan.layout, stages=""), plan.chunks).scene
        whole = timeline.simulate(
            scene.schedule, scene.ranks, scene.chunks, scene.micro_batches, scene.taken, scene.message
        ).seconds[0]
        assert plan.seconds == pytest.approx(whole + scene.exchange + scene.optimizer, rel=0.01)
        assert sum(plan.parts.values()) == pytest.approx(plan.seconds)
        assert plan.parts["bubble"] >= 0
        assert plan.seconds == pytest.approx(one.seconds, rel=0.1)
    assert [plan.layout.schedule for plan in search.search(question, best=3).plans]
    monkeypatch.setattr(piped, "_OPERATIONS", 0)
    assert space.simulated(found) == found


def test_of_what_there_is_time_for_each_schedule_is_laid_out_once(monkeypatch: pytest.MonkeyPatch):
    few = piped.Case("zbv", 2, 2, 6)
    cases = [few._replace(micro_batches=m) for m in (6, 60, 600)]
    larger = piped.Case("dualpipev", 4, 2, 100)
    monkeypatch.setattr(piped, "_OPERATIONS", 2 * 3 * 6 * 2 * 2)
    assert list(piped.affordable([*cases, larger, few])) == cases
    assert list(piped.affordable([larger, *cases])) == cases


def test_a_plan_adds_up():
    question = asked.of_model("llama3-70b", cluster.named("h100x64"), Wanted())
    found = search.search(question, best=20)
    assert found.candidates > 10_000
    assert found.compared < found.candidates
    for plan in found.plans:
        assert sum(plan.parts.values()) == pytest.approx(plan.seconds)
        assert plan.low < plan.seconds < plan.high
        assert plan.total * 1.1 <= plan.capacity
        assert plan.mfu == pytest.approx(
            question.shape.flops_per_token(8192) * plan.tokens_per_second / (64 * 989e12), rel=1e-3
        )
        assert plan.limit in (
            "compute", "memory bandwidth", "launching", "pipeline bubble", "nvlink inside nodes",
            "infiniband between nodes",
        )  # fmt: skip
    later = [plan.seconds for plan in found.plans]
    assert all(after >= before / 1.0051 for before, after in pairwise(later))


@pytest.mark.parametrize(("network", "limit"), [("0.001x", "between nodes"), ("1x", "compute")])
def test_what_limits_it(network: str, limit: str):
    where = cluster.named("h100x16")
    factor = float(network.rstrip("x"))
    pool = replace(where.pools[0], between=replace(where.pools[0].between, bandwidth=50e9 * factor))
    question = asked.of_model("llama3-8b", replace(where, pools=(pool,)), Wanted(global_batch=64))
    assert search.search(question, best=1).plans[0].limit.endswith(limit)


def test_cost_and_days():
    question = replace(asking(DENSE, 8, 24), cluster=asked.cluster_of("h100x8", 3.0), tokens=1e12)
    plan = search.search(question, best=1).plans[0]
    days = 1e12 / plan.tokens_per_second / 86400
    assert plan.days == pytest.approx(days)
    assert plan.cost * 1e3 == pytest.approx(days * 24 * 8 * 3.0)


def test_several_kinds_of_devices_are_refused():
    with pytest.raises(JobError, match="not searched so"):
        search.search(asked.of_model("llama3-8b", cluster.named("h100x8+a100-80x8"), Wanted()))


@pytest.mark.parametrize(("model", "where"), [("llama3-405b", "h100x16384"), ("1t-moe", "h100x65536")])
def test_the_largest_end(model: str, where: str):
    """Within a generous limit; how long they take is a benchmark's business."""
    found = search.search(asked.of_model(model, cluster.named(where), Wanted()))
    assert len(found.plans) == 10
    assert found.seconds < 60


def test_a_layout_by_itself_is_what_the_search_says_of_it():
    question = asking(DENSE, 8, 24)
    space, answer = search.Space(question), search.search(question)
    assert answer.plans
    for plan in answer.plans:
        found = space.find(plan.layout, plan.chunks)
        assert found is not None
        assert space.plan(*space.simulated([found])) == plan
    assert space.find(Layout(tensor=4, fsdp=2, micro_batch=1)) is None, "6 heads are not cut in 4"


def test_it_is_asked_from_python_too():
    found = shoal.plan("llama3-8b", "h100x16", best=2, price=2.0, global_batch=64, tokens="1T")
    question = asked.of_model("llama3-8b", asked.cluster_of("h100x16", 2.0), Wanted(global_batch=64, tokens="1T"))
    assert found.plans == search.search(question, best=2).plans
    job = Job(model=DENSE, train=replace(Job().train, global_batch=24))
    assert shoal.plan(job, "h100x8", best=1).plans[0].layout.world == 8
    with pytest.raises(JobError, match="no model is called"):
        shoal.plan("llama9-8b", "h100x16")
