"""One pipeline through several pools: one kind of device cut in two, every candidate computed, slow lines, memory."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from shoal.planning import answered, asked, cluster, search, show, show_pools, spanning, uneven
from shoal.planning.cluster import Cluster, Link
from shoal.planning.spanning import Search
from shoal.planning.stages import Stages
from shoal.planning.through import Through
from tests.planning.plans import plan
from tests.planning.test_uneven import cut, question


def _through(question, each, order, **wanted):
    """The candidate with these numbers of a base, fsdp and ZeRO's stage."""
    stages = Stages(question, each)
    base, fsdp, zero = stages.splits
    bases, of_split = stages.spaces[0].bases, {"fsdp": fsdp, "zero": zero}
    same = np.ones(len(base), dtype=bool)
    for name, value in wanted.items():
        same &= (of_split[name] if name in of_split else getattr(bases, name)[base]) == value
    (candidate,) = np.flatnonzero(same)
    return Through(stages, int(candidate), order, stages.most(order)[candidate])


@pytest.mark.parametrize(("model", "micro_batch"), [("gpt2", 2), ("mixtral-8x7b", 1)])
def test_one_kind_of_device_cut_in_two_is_one_pool(model, micro_batch):
    """Parts, memory and layout as `shoal plan` gives them on all of it, but for messages and waiting: those are
    simulated here, and of closed forms there."""
    asked_ = replace(question(cut("h100", 8, 8), model, 64), sequence=1024)
    wanted = {"tensor": 2, "context": 1, "expert": 1, "micro_batch": micro_batch, "recompute": 0, "fsdp": 1, "zero": 3}
    one = _through(asked_, 4, (0, 1), **wanted)
    # Blocks that come out even, as those of one pool are; whether they fit or not.
    object.__setattr__(one, "divisions", np.full((1, 4), asked_.shape.layers // 4))
    space = search.Space(replace(asked_, cluster=cluster.named("h100x16")))
    layout = replace(one.layout(), stages="")
    expected = space.plan(space.find(layout))
    found = one.plan()
    assert found.layout.pipeline == 4
    for name in ("tensor", "context", "fsdp", "data", "optimizer", "compute"):
        assert found.parts[name] == pytest.approx(expected.parts[name], rel=1e-9), name
    assert found.total == pytest.approx(expected.total, rel=1e-9)
    assert found.seconds == pytest.approx(expected.seconds, rel=0.02)
    assert found.parts["bubble"] == pytest.approx(expected.parts["bubble"], rel=0.01)


def test_the_fastest_is_that_of_all_computed():
    of = Search(question("h100x2+l4x4", "gpt2", 24))
    every = [one for _, one in of._sorted()]
    assert len(every) > 100
    best = min(one.fastest().plan().seconds for one in every if one.estimate is not None)
    assert of.fastest(1)[0].seconds == pytest.approx(best, rel=0.005)
    assert of.computed < len(every)


def test_no_division_is_under_the_bound():
    stages = Stages(question("h100x8+a100-80x16", batch=96), 8)
    bounds, most = stages.bounds(1), stages.most((0, 1))
    some = [n for n in range(0, len(bounds), 7) if (most[n] >= 1).all()]
    found = [(Through(stages, n, (0, 1), most[n]).estimate, bounds[n]) for n in some]
    fitting = [(estimate, bound) for estimate, bound in found if estimate is not None]
    assert len(fitting) > 5
    assert all(estimate >= bound for estimate, bound in fitting)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_blocks_that_a_rank_has_memory_for(order):
    """As many as fit, and not one more, on every rank, though only those at the ends of pools are computed."""
    stages = Stages(question("h100x16+l40sx16", "llama3-8b", 64), 4)
    most = stages.most(order)
    checked = 0
    for candidate in range(0, len(most), 5):
        for rank, pool in enumerate(stages.places(order)):
            some, which = int(most[candidate, rank]), np.array([candidate])
            room = stages.pools[pool].device.memory
            if 0 < some < 32:
                held = stages.memory(pool, which, rank, some).total("device", room)[0]
                assert held * search.SPARE <= room * (1 + 1e-9)
            if some < 32:
                over = stages.memory(pool, which, rank, some + 1).total("device", room)[0] * search.SPARE
                assert over > room * (1 - 1e-9)
                checked += 1
    assert checked > 100


def test_a_model_that_no_pool_holds_lies_in_both():
    """And the job can have it: as many blocks as the pools are fast, each rank within its memory."""
    asked_ = asked.of_model("llama3-70b", cluster.named("h100x16+a100-80x16"), asked.Wanted(global_batch=256))
    assert not uneven.search(asked_, 1).plans
    found = answered.plans(asked_, 1)
    assert len(found.plans) == 1
    assert found.more
    best = found.plans[0]
    assert dict(best.along).keys() == {"h100", "a100-80"}
    assert sum(ranks for _, ranks in best.along) == best.layout.pipeline
    assert sum(best.layout.blocks_per_stage) == 80
    assert best.layout.world == 32
    assert best.total * search.SPARE <= best.capacity * (1 + 1e-9)
    assert sum(best.parts.values()) == pytest.approx(best.seconds)
    best.layout.validate()
    assert "of the pipeline, 56 of 80 blocks" in show_pools.pools(asked_, best, [])
    assert show.told(asked_, best)["along"] == dict(best.along)


def test_a_line_between_sites_carries_every_micro_batch():
    """A slow one is what all wait for, once for each micro-batch; and a pipeline needs less of it than gradients."""
    pools = tuple(replace(pool, site=pool.device.name) for pool in cluster.named("h100x4+a100-80x4").pools)

    def on(bandwidth):
        line = {("a100-80", "h100"): Link("internet", bandwidth, 0.05)}
        return question(Cluster("sites", pools, line), "llama3-8b", 32)

    slow = spanning.search(on(1e8), 1).plans[0]
    tokens = 32 * 8192
    # 4,096 values of 2 bytes for each token, in one direction at a time.
    assert slow.seconds > tokens * 4096 * 2 / 1e8
    assert slow.parts["messages"] > 0.5 * slow.seconds
    assert slow.limit == "messages of the pipeline from pool to pool"
    fast = spanning.search(on(1e11), 1).plans[0]
    # What is left is latency: two ranks of 1F1B wait for half of their messages.
    assert fast.parts["messages"] < 0.2 * fast.seconds
    assert answered.plans(on(1e8), 1).plans[0].along


def test_slower_devices_have_fewer_blocks():
    best = spanning.search(question("h100x8+a100-80x8", "llama3-8b", 96), 1).plans[0]
    names = [name for name, ranks in best.along for _ in range(ranks)]
    blocks = dict.fromkeys(names, 0)
    for name, some in zip(names, best.layout.blocks_per_stage, strict=True):
        blocks[name] += some
    assert blocks["h100"] > 1.5 * blocks["a100-80"]


def test_what_stands_below_the_table():
    found = plan("replicas=2,pipeline=3,stages=2+5+3", 1.0, along=(("old", 1), ("new", 2)))
    told = show_pools.pools(question(), found, [("old", None), ("new", None)])
    assert "pool old: rank 0 of each replica's pipeline, 2 of 10 blocks" in told
    assert "pool new: ranks 1 to 2 of each replica's pipeline, 8 of 10 blocks" in told


def test_blocks_of_two_kinds_are_left_alone():
    """DeepSeek-V3's first three have no experts."""
    asked_ = asked.of_model("deepseek-v3", cluster.named("h100x512+a100-80x512"), asked.Wanted(global_batch=2048))
    assert spanning.search(asked_).plans == ()
