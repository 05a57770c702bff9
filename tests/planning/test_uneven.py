"""Several pools in one job: shares against all that there are, one kind of device cut in two, and the fastest found."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import JobError
from shoal.job import Layout
from shoal.planning import answered, asked, cluster, search, show_pools, uneven
from shoal.planning.cluster import Cluster, Link
from tests.planning.plans import plan

MIXED = "h100x8+a100-80x16"


def question(where=MIXED, model="llama3-8b", batch=96):
    found = cluster.named(where) if isinstance(where, str) else where
    return asked.of_model(model, found, asked.Wanted(global_batch=batch))


def cut(device: str, *counts: int) -> Cluster:
    """Pools of one kind of device, as one network has them."""
    whole = cluster.named(f"{device}x{sum(counts)}").pools[0]
    pools = tuple(replace(whole, name=f"part {n}", count=count) for n, count in enumerate(counts))
    return Cluster("cut", pools, {})


def numbers(of: uneven.Search, layout: Layout) -> list[int]:
    """Of candidates that have these axes."""
    base, fsdp, zero = of._splits
    bases = of.spaces[0].bases
    same = (fsdp == layout.fsdp) & (zero == layout.zero)
    for name in ("tensor", "context", "pipeline", "micro_batch"):
        same &= getattr(bases, name)[base] == getattr(layout, name)
    return np.flatnonzero(same).tolist()


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 5), st.floats(0, 5), st.integers(1, 2)), min_size=1, max_size=3),
    st.integers(1, 2), st.integers(0, 7),
)  # fmt: skip
def test_shares_end_as_early_as_any(pools, least, more):
    slope, fixed, counts = (list(column) for column in zip(*pools, strict=True))
    of = [n for n, count in enumerate(counts) for _ in range(count)]
    whole = least * len(of) + more

    def ends(shares):
        return max(fixed[pool] + slope[pool] * share for pool, share in zip(of, shares, strict=True))

    found = uneven.shared(slope, fixed, counts, least, whole)
    assert sum(found) == whole
    assert min(found) >= least
    every = (s for s in product(range(least, least + more + 1), repeat=len(of)) if sum(s) == whole)
    assert ends(found) == pytest.approx(min(map(ends, every)))
    assert uneven.shared(slope, fixed, counts, least, least * len(of) - 1) == []


@pytest.mark.parametrize(
    "layout", ["replicas=8,tensor=2,micro_batch=1", "replicas=4,fsdp=4,zero=1,micro_batch=2,recompute=block"]
)
def test_one_kind_of_device_cut_in_two_is_one_pool(layout):
    """The same seconds, memory and shares as `shoal plan` gives the same layout on all of it."""
    of_two = uneven.Search(question(cut("h100", 8, 8), "gpt2", 64))
    whole = search.Space(question("h100x16", "gpt2", 64))
    one = whole.find(Layout.parse(layout))
    expected = whole.plan(one)
    even = 64 // (expected.layout.replicas * expected.layout.fsdp * expected.layout.micro_batch)
    counts = [expected.layout.replicas // 2] * 2
    every = (of_two._exactly(n, [even] * expected.layout.replicas, counts) for n in numbers(of_two, expected.layout))
    (found,) = [each.plan for each in every if each is not None and each.plan.layout == expected.layout]
    assert found.seconds == pytest.approx(expected.seconds, rel=1e-9)
    assert found.total == pytest.approx(expected.total, rel=1e-9)
    assert found.mfu == pytest.approx(expected.mfu)
    assert found.parts == pytest.approx(dict(expected.parts))


def test_the_fastest_is_that_of_all_computed():
    """Every candidate, with its shares, without bounds."""
    of = uneven.Search(question("h100x2+l4x4", "gpt2", 24))
    base, fsdp, _ = of._splits
    assert len(base) > 50
    best = np.inf
    for n in range(len(base)):
        counts = [pool.count // int(of.ranks[n]) for pool in of.pools]
        whole = 24 // int(fsdp[n] * of.spaces[0].bases.micro_batch[base[n]])
        slope, fixed = of._lines(np.array([n]))
        each = uneven.shared(slope[:, 0].tolist(), fixed[:, 0].tolist(), counts, int(of.least[n]), whole)
        one = of._exactly(n, each, counts) if each else None
        best = min(best, one.plan.seconds if one else np.inf)
    assert of.fastest(1)[0].plan.seconds == pytest.approx(best, rel=0.005)


def test_faster_devices_get_more_and_all_end_together():
    """Of ten times as many micro-batches as replicas nobody waits a tenth of a step."""
    found = uneven.Search(question(batch=960)).fastest(1)[0]
    new, old = found.held
    assert min(new.micro_batches) > max(old.micro_batches)
    assert min(found.seconds) > 0.9 * max(found.seconds)
    assert max(found.seconds) == pytest.approx(found.plan.seconds)
    assert sum(found.plan.parts.values()) == pytest.approx(found.plan.seconds)
    assert found.plan.total * 1.1 <= found.plan.capacity
    layout = found.plan.layout
    assert layout.replicas == len(layout.shares)
    assert layout.world == 24
    held = uneven.shares(question(batch=960), found.plan)
    assert [len(shares) * layout.ranks_per_replica for _, shares in held] == [8, 16]


def test_a_line_between_sites_is_waited_for():
    """Half the bandwidth, twice the seconds that gradients show, of what is left when all else is hidden."""
    pools = tuple(replace(pool, site=pool.device.name) for pool in cluster.named(MIXED).pools)

    def data(bandwidth: float) -> float:
        line = {("a100-80", "h100"): Link("internet", bandwidth, 0.0)}
        return uneven.Search(question(Cluster("sites", pools, line))).fastest(1)[0].plan.parts["data"]

    assert data(0.5e9) > 1.6 * data(1e9) > 0
    # Gradients of 8.03e9 weights in 2 bytes, there and back, of two replicas or more: once through the line, or more.
    assert data(1e8) > 8.03e9 * 2 / 1e8


def test_what_is_answered():
    found = answered.plans(question(), 3)
    assert len(found.plans) == 3
    assert found.candidates > found.compared > 0
    text = answered.text(question(), found, 1)
    assert "pool h100: r" in text
    assert "pool a100-80 alone: " in text
    assert "times as fast as" in text


def test_advice_says_when_a_pool_does_better_alone():
    mixed = plan("replicas=3,replica_share=2+1+1,fsdp=8", 2.0)
    for seconds, words in ((1.0, "Take h100 alone: together they are slower, 0.50 times"), (3.0, "are 1.50 times as")):
        told = show_pools.pools(question(), mixed, [("h100", plan("fsdp=8", seconds)), ("a100-80", None)])
        assert words in told
        assert "pool h100: replica 0, 50.0 % of the batch" in told
        assert "pool a100-80: replicas 1 to 2, 50.0 % of the batch" in told
        assert "a100-80 alone: nothing fits" in told
    assert "No pool would do alone." in show_pools.pools(question(), mixed, [("h100", None), ("a100-80", None)])


def test_what_cannot_be(monkeypatch):
    with pytest.raises(JobError, match=r"replicas of all pools .* and in no pipeline through") as caught:
        answered.plans(question("h100x8+l4x1", batch=8), 1)
    assert "h100 alone" in str(caught.value.fix)
    monkeypatch.setattr(answered, "alone", lambda question: [("h100", None)])
    with pytest.raises(JobError) as caught:
        answered.plans(question("h100x8+l4x1", batch=8), 1)
    assert "what would do" in str(caught.value.fix)
    sync = replace(question(), sync=replace(question().sync, name="local"))
    with pytest.raises(JobError, match="not planned on several pools"):
        answered.plans(sync, 1)
