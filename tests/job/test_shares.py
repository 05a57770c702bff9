"""Who computes how much where machines are uneven: whole numbers, every sequence once, nobody waits for long."""

from __future__ import annotations

from dataclasses import replace
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import JobError, LayoutError
from shoal.job import Job, Layout, shares
from shoal.job.fits import check_layout, shared_out
from shoal.job.sync import SyncOptions
from shoal.job.train import TrainOptions

NUMBERS = st.lists(st.integers(1, 9), min_size=2, max_size=6)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8), st.integers(1, 3), st.integers(0, 60))
def test_pieces_go_where_they_are_done_first(speeds: list[float], least: int, more: int):
    pieces = least * len(speeds) + more
    numbers = shares.in_proportion(pieces, speeds, least)
    assert sum(numbers) == pieces
    assert min(numbers) >= least
    # As near to the proportion as can be: were everybody done a little earlier, pieces would be left over.
    latest = max(n / speed for n, speed in zip(numbers, speeds, strict=True) if n > least or not more)
    earlier = [max(least, floor(latest * (1 - 1e-9) * speed)) for speed in speeds]
    assert not more or sum(earlier) < pieces


@given(NUMBERS, st.integers(1, 20))
def test_what_can_be_in_proportion_is(numbers: list[int], times: int):
    assert shares.in_proportion(times * sum(numbers), numbers) == [times * n for n in numbers]


@given(NUMBERS, st.integers(1, 3), st.integers(1, 3), st.data())
def test_readers_have_every_sequence_of_a_step_once(numbers: list[int], fsdp: int, times: int, data: st.DataObject):
    layout = Layout(replicas=len(numbers), fsdp=fsdp, replica_share="+".join(map(str, numbers)))
    batch = times * layout.pieces
    taking = data.draw(st.sets(st.integers(0, layout.replicas - 1), min_size=1).map(sorted) | st.none())
    rows = [shares.rows(layout, batch, reader, taking) for reader in range(layout.readers)]
    took = [sum(len(r) for r in rows[i * fsdp : (i + 1) * fsdp]) for i in range(layout.replicas)]
    here = range(layout.replicas) if taking is None else taking
    assert [row for part in rows for row in part] == list(range(sum(took)))
    assert took == [batch * n // sum(numbers) if r in here else 0 for r, n in enumerate(numbers)]
    assert len({len(r) for r in rows[:fsdp]}) == 1


@given(NUMBERS, st.integers(0, 200), st.integers(1, 50))
def test_steps_of_a_pace_are_spread_evenly(paces: list[int], first: int, length: int):
    sync = SyncOptions(name="local", pace="+".join(map(str, paces)))
    taken = [shares.taking(sync, len(paces), step) for step in range(first, first + length)]
    for replica, pace in enumerate(paces):
        count = sum(replica in step for step in taken)
        assert abs(count - length * pace / max(paces)) < 1
        assert shares.often(sync, replica) == pytest.approx(pace / max(paces))
    assert all(paces.index(max(paces)) in step for step in taken)


def test_before_replicas_part_all_take_every_step():
    sync = SyncOptions(name="local", pace="3+1", together=4)
    assert [len(shares.taking(sync, 2, step)) for step in range(8)] == [2, 2, 2, 2, 1, 2, 1, 1]


def test_what_counts_in_a_mean_is_one_on_average():
    layout = Layout.parse("replicas=3,replica_share=2+1+1")
    assert shares.weights(layout, SyncOptions()) == [1.5, 0.75, 0.75]
    assert shares.weights(layout, SyncOptions(name="local", pace="1+2+2")) == [1.0, 1.0, 1.0]
    assert shares.weights(Layout(replicas=3), SyncOptions()) == [1.0, 1.0, 1.0]


def job(layout: str, batch: int = 12, **sync) -> Job:
    return Job(layout=Layout.parse(layout), train=TrainOptions(steps=1, global_batch=batch), sync=SyncOptions(**sync))


@pytest.mark.parametrize(
    ("layout", "batch", "sync", "what", "fix"),
    [
        ("replicas=2,replica_share=3+2", 12, {}, "not divisible by the 5 pieces", "global_batch=10 or 15"),
        ("replicas=2,replica_share=6+2", 4, {}, "", ""),
        ("replicas=2,replica_share=3+1,fsdp=2", 12, {}, "not divisible by the 8 pieces", "global_batch=8 or 16"),
        ("replicas=2,replica_share=3+1,micro_batch=2", 12, {}, "does not divide the 9 sequences", "take 1 or 3"),
        ("replicas=2,replica_share=2+1,pipeline=2", 6, {}, "", ""),
        ("replicas=2,replica_share=2+1,pipeline=2", 3, {}, "cannot run 1 micro-batch", "global_batch=6"),
        ("replicas=2,replica_share=auto", 1, {}, "parts of 1 sequence, 1 or more for each replica", "global_batch=2"),
        ("replicas=2,replica_share=auto,micro_batch=5", 12, {}, "in parts of 5 sequences", "global_batch=10 or 15"),
        ("replicas=2,replica_share=auto,pipeline=2,micro_batch=2", 6, {}, "2 or more for each", "global_batch=8"),
        ("replicas=2", 12, {"name": "local", "pace": "2+1+1"}, "has 3 numbers for replicas=2", "give 2"),
        ("replicas=2", 12, {"name": "local", "pace": "2"}, "has 1 number for replicas=2", "give 2"),
        ("replicas=2", 12, {"pace": "2+1"}, "sync.name=allreduce", "replica_share"),
        ("replicas=2", 12, {"name": "gossip", "pace": "auto"}, "sync.name=gossip", "sync.name=local"),
        ("replicas=2", 12, {"name": "local", "pace": "2-1"}, "is not a list of whole numbers above 0", "2+1"),
        ("replicas=2", 12, {"name": "local", "pace": "5+1", "every": 4}, "no step of sync.every=4", "sync.every=5"),
    ],
)
def test_what_cannot_be_shared_is_refused_with_what_would_do(layout, batch, sync, what, fix):
    wanted = job(layout, batch, **sync)
    if not what:
        wanted.validate()
        return
    with pytest.raises(JobError) as caught:
        wanted.validate()
    assert what in caught.value.what
    assert fix in caught.value.fix
    if "global_batch=" in fix:
        for number in fix.partition("=")[2].split(" or "):
            replace(wanted, train=replace(wanted.train, global_batch=int(number))).validate()


@pytest.mark.parametrize("share", ["3+0", "+1", "3+1+", "a+b", "3+99999999", "3+1+1", "2", "３+1"])
def test_a_wrong_list_is_refused(share: str):
    with pytest.raises(LayoutError, match=r"layout replica_share=.* (is not a list|too large|\d numbers? for)"):
        Layout.parse(f"replicas=2,replica_share={share}")


def test_a_share_needs_replicas():
    with pytest.raises(LayoutError, match="no replicas to share among"):
        Layout.parse("fsdp=2,replica_share=auto")


SIZES = st.fixed_dictionaries(
    {"replicas": st.integers(2, 4), "fsdp": st.integers(1, 2), "micro_batch": st.integers(0, 3)}
) | st.fixed_dictionaries(
    {
        "replicas": st.integers(2, 4), "pipeline": st.just(2), "micro_batch": st.integers(0, 2),
        "schedule": st.sampled_from(["1f1b", "interleaved", "dualpipev", "gpipe"]),
    }
)  # fmt: skip


@given(SIZES, st.integers(1, 60), st.lists(st.floats(0.05, 20), min_size=4, max_size=4))
def test_whatever_is_measured_the_shares_fit(sizes, batch: int, speeds: list[float]):
    """Where `auto` is not refused before."""
    wanted = job(str(Layout(**sizes, replica_share="auto")), batch)
    try:
        layout = check_layout(wanted)
    except JobError:
        return
    decided = shared_out(batch, layout, speeds[: layout.replicas])
    assert check_layout(replace(wanted, layout=decided)) == decided
    assert sum(shares.sequences(decided, batch)) == batch == sum(shares.sequences(layout, batch))
