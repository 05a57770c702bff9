"""Scenes of planned layouts: what they take without trouble is what the closed forms say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shoal.errors import JobError
from shoal.job import Layout
from shoal.planning import asked, scene, simulation, spanning
from shoal.planning.search import Space


def question(model="llama3-8b", where="h100x64", batch=512):
    return asked.of_model(model, asked.cluster_of(where, 0.0), asked.Wanted(global_batch=batch))


@pytest.mark.parametrize(
    ("model", "where", "layout", "bound"),
    [
        ("llama3-8b", "h100x64", "fsdp=64,micro_batch=1", 1e-9),
        ("llama3-8b", "h100x64", "replicas=2,fsdp=4,context=2,tensor=4,micro_batch=2", 1e-9),
        # 126 blocks on 16 ranks: the last has six of them, and the output layer.
        ("llama3-405b", "h100x1024", "pipeline=16,fsdp=8,tensor=8,micro_batch=1,recompute=block", 0.02),
        ("llama3-405b", "h100x1024", "pipeline=16,fsdp=8,tensor=8,micro_batch=1,schedule=interleaved", 0.02),
        ("llama3-405b", "h100x1024", "pipeline=16,fsdp=8,tensor=8,micro_batch=1,schedule=looped_bfs", 0.02),
        ("llama3-405b", "h100x1024", "pipeline=16,fsdp=8,tensor=8,micro_batch=1,schedule=gpipe", 0.02),
        ("deepseek-v3", "h100x512", "pipeline=16,fsdp=8,tensor=4,expert=32,micro_batch=1", 0.03),
    ],
)
def test_without_trouble_a_step_takes_what_is_predicted(model, where, layout, bound):
    """As the bubble's closed form and the simulated schedule agree: exactly without a pipeline; with one, up to
    messages (counted as if each were waited for) and stages that differ."""
    found = scene.staged(question(model, where), Layout.parse(layout))
    assert simulation.usual_seconds(found.scene) == pytest.approx(found.plan.seconds, rel=bound)
    assert found.scene.actors * found.scene.devices == found.plan.layout.world


def test_stages_are_full_from_the_first_on():
    """126 blocks, 8 on each of 16 ranks: 6 are left for the last, whose output layer takes the rest of its time."""
    found = scene.staged(
        question("llama3-405b", "h100x1024"), Layout.parse("pipeline=16,fsdp=8,tensor=8,micro_batch=1")
    )
    forward, backward, weight = found.scene.taken
    assert np.ptp(forward[:-1]) == 0
    assert np.array_equal(backward, weight)
    assert forward[-1] > forward[0] * 6 / 8
    # Three equal products of the output layer, one in each.
    assert forward[-1] - forward[0] * 6 / 8 == pytest.approx(backward[-1] - backward[0] * 6 / 8)


def test_a_micro_batch_that_is_left_out_is_the_fastest_that_fits():
    asking, layout = question(), Layout.parse("replicas=8,pipeline=4,tensor=2")
    found = scene.staged(asking, layout)
    space = Space(asking)
    each = [space.find(replace(layout, micro_batch=size)) for size in (1, 2, 4, 8, 16)]
    seconds = {one.seconds: one for one in each if one is not None and 1.1 * one.total <= found.plan.capacity}
    assert len(seconds) > 1
    assert found.plan.seconds == min(seconds)
    assert found.fits


def test_one_that_does_not_fit_is_simulated_and_says_so():
    assert not scene.staged(question(), Layout.parse("replicas=64,micro_batch=1")).fits


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("replicas=8,tensor=4", "has 32 ranks, and h100x64 has 64 devices"),
        ("replicas=64,micro_batch=3", "cannot be had by llama3-8b with 512 sequences"),
        ("pipeline=64,micro_batch=1", "cannot be had"),
        ("tensor=64", "cannot be had"),
    ],
)
def test_what_cannot_be(layout, words):
    with pytest.raises(JobError, match=words):
        scene.staged(question(), Layout.parse(layout))


def test_several_pools_are_refused():
    with pytest.raises(JobError, match="several pools"):
        scene.staged(question(where="h100x32+a100-80x32"), Layout.parse("replicas=64,micro_batch=1"))


def test_a_pipeline_through_several_pools_takes_what_was_planned():
    """And one that is given, with its stages, in whatever order of the pools is best."""
    asked_ = question(where="h100x8+a100-80x8")
    plan = spanning.search(asked_, 1).plans[0]
    found = scene.staged(asked_, plan.layout, along=[name for name, _ in plan.along])
    assert (found.plan.layout, found.plan.along, found.fits) == (plan.layout, plan.along, True)
    assert found.plan.seconds == pytest.approx(plan.seconds)
    assert simulation.usual_seconds(found.scene) == pytest.approx(plan.seconds, rel=0.01)
    assert scene.staged(asked_, plan.layout).plan.seconds == pytest.approx(plan.seconds)
    blocks = plan.layout.blocks_per_stage
    worse = replace(plan.layout, stages="+".join(map(str, (blocks[0] + 1, *blocks[1:-1], blocks[-1] - 1))))
    other = scene.staged(asked_, worse)
    assert other.plan.layout == worse
    assert other.plan.seconds >= plan.seconds
    one, many = (replace(found.scene, message=(seconds,) * (plan.layout.pipeline - 1)) for seconds in (0.0, 0.5))
    assert simulation.usual_seconds(many) > simulation.usual_seconds(one) + 1.0
    served = replace(asked_, sync=replace(asked_.sync, name="server"))
    with pytest.raises(JobError, match="another sync than all-reduce"):
        scene.staged(served, plan.layout)
    with pytest.raises(JobError, match="message"):
        replace(found.scene, message=(-1.0,)).validate()
