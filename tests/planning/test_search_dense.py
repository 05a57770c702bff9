"""The search of dense models: it tries all that a job may have, ranks by time, and its plans add up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest

from shoal.errors import JobError
from shoal.job import Job, Layout
from shoal.job.fits import check_layout, check_model
from shoal.job.model import ModelOptions
from shoal.planning import asked, cluster, constants, memory, search, shapes, step
from shoal.planning.asked import Wanted
from shoal.planning.plan import Question

# Sizes that many degrees do not divide.
MODEL = ModelOptions(
    hidden_size=96, intermediate_size=160, num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2,
    vocab_size=500,
)  # fmt: skip


def asking(devices: int, batch: int) -> Question:
    where = cluster.named(f"h100x{devices}")
    return Question(shapes.of_options(MODEL), where, sequence=48, global_batch=batch)


def allowed(layout: Layout, batch: int) -> bool:
    try:
        layout.validate()
        check_layout(replace(Job(), layout=layout, train=replace(Job().train, global_batch=batch)))
        check_model(MODEL, 48, layout)
    except JobError:
        return False
    return True


@pytest.mark.parametrize(("devices", "batch"), [(8, 24), (16, 32), (6, 12)])
def test_all_that_a_job_may_have_are_tried(devices: int, batch: int):
    degrees = [n for n in range(1, devices + 1) if devices % n == 0]
    every = {
        layout
        for r, p, f, t in product(degrees, repeat=4)
        if r * p * f * t == devices and t <= 8
        for micro, zero, recompute in product(range(1, 17), (1, 2, 3), ("none", "block"))
        if f > 1 or zero == 3
        if allowed(
            layout := Layout(
                replicas=r, pipeline=p, fsdp=f, tensor=t, zero=zero, micro_batch=micro, recompute=recompute
            ),
            batch,
        )
    }
    assert len(every) > 10
    question = asking(devices, batch)
    assert {one for one in search._layouts(question) if search._allowed(question, one)} == every
    found = search.search(question, best=100)
    assert (found.candidates, found.fitting) == (len(every), len(every))


def test_the_fastest_that_fits_comes_first():
    question = asked.of_model("llama3-70b", cluster.named("h100x64"), Wanted())
    found = search.search(question, best=20)
    layouts = [one for one in search._layouts(question) if search._allowed(question, one)]
    candidates = search._work(question, search.stacks.STACKS[question.stack], layouts)
    seconds = step.cost(candidates, constants.load()).seconds
    total = memory.cost(candidates).total("device")
    fits = {layout: (s, m) for layout, s, m in zip(layouts, seconds, total, strict=True) if 1.1 * m <= 80 * 2**30}
    assert found.fitting == len(fits) < found.candidates
    least = min(s for s, _ in fits.values())
    first = found.plans[0]
    assert least <= first.seconds <= 1.005 * least
    for plan in found.plans:
        assert (plan.seconds, plan.total) == pytest.approx(fits[plan.layout])
        assert sum(plan.parts.values()) == pytest.approx(plan.seconds)
        assert plan.low < plan.seconds < plan.high
        assert plan.mfu == pytest.approx(
            question.shape.flops_per_token(8192) * plan.tokens_per_second / (64 * 989e12), rel=1e-3
        )
    later = [plan.seconds for plan in found.plans]
    assert all(after >= before / 1.005 for before, after in pairwise(later))


def test_cost_and_days():
    question = replace(asking(8, 24), cluster=asked.cluster_of("h100x8", 3.0), tokens=1e12)
    plan = search.search(question, best=1).plans[0]
    days = 1e12 / plan.tokens_per_second / 86400
    assert plan.days == pytest.approx(days)
    assert plan.cost * 1e3 == pytest.approx(days * 24 * 8 * 3.0)


def test_where_none_fits_the_nearest_is_told():
    question = asked.of_model("llama3-70b", cluster.named("h100x8"), Wanted(global_batch=32))
    found = search.search(question)
    assert found.plans == ()
    layouts = [one for one in search._layouts(question) if search._allowed(question, one)]
    total = memory.cost(search._work(question, search.stacks.STACKS[question.stack], layouts)).total("device")
    assert found.nearest.total == pytest.approx(min(total))
    assert found.nearest.total * 1.1 > found.nearest.capacity


@pytest.mark.parametrize("where", ["h100x8+a100-80x8", "h100x8"])
def test_refused(where: str):
    model = "llama3-8b" if "+" in where else "mixtral-8x7b"
    with pytest.raises(JobError, match="not planned yet"):
        search.search(asked.of_model(model, cluster.named(where), Wanted()))
