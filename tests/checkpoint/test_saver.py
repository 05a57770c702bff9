"""Saving beside training: what blocks, what is kept, what is refused."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import Saver, folders, saver
from shoal.checkpoint.messages import part_name
from shoal.shard import Shard, State
from tests.checkpoint.fleet import Fleet, assert_is, names, newest_is_whole, rank_state


def test_older_ones_go_when_the_new_one_is_complete(tmp_path):
    with Fleet(tmp_path, keep=2) as fleet:
        for step in (10, 20, 30):
            assert all(pending.error is None for pending in fleet.step(step))
        assert names(tmp_path) == ["step-00000020", "step-00000030"]
        assert_is(tmp_path / "step-00000020", 20)
        assert_is(tmp_path / "step-00000030", 30)
        assert not [name for name in names(tmp_path / "step-00000030") if not name.startswith(("rank", "manifest"))]


def test_save_returns_before_anything_is_written(tmp_path):
    """The helper stands still: save returns all the same, and what changes afterwards is not saved."""
    with Saver(tmp_path, 0, 1, 2, nonce="n") as one:
        os.kill(one._helper.process.pid, signal.SIGSTOP)
        weight = torch.ones(1000)
        pending = one.save(State([Shard("w", (1000,), (0,), weight)]), 1)
        weight.zero_()
        assert not pending.done()
        assert pending.error is None
        assert pending.write_seconds is None
        os.kill(one._helper.process.pid, signal.SIGCONT)
        # The one buffer is in use: the next save waits for the first.
        second = one.save(State([Shard("w", (1000,), (0,), weight)]), 2)
        assert pending.done()
        assert second.wait()
        assert second.waited_seconds > 0
        assert pending.write_seconds > 0
    (name, saved), *_ = checkpoint.tensors(tmp_path / "step-00000001")
    assert name == "w"
    assert (saved == 1).all()


def test_close_waits_for_the_save_that_is_on_its_way(tmp_path):
    with Fleet(tmp_path, world=1) as fleet:
        fleet.savers[0].save(rank_state(7, 0, 1), 7)
        fleet.savers[0].close()
        assert_is(tmp_path / "step-00000007", 7)
        fleet.savers.clear()


def test_ranks_that_hold_nothing_take_part(tmp_path):
    with Fleet(tmp_path) as fleet:
        empty = Shard("norm.weight", (12, 5), (12, 0), torch.empty(0, 5))
        states = [rank_state(5, 0, 1), State([]), State([empty])]
        assert all(pending.error is None for pending in fleet.save(states, 5))
    assert names(tmp_path / "step-00000005") == ["manifest.json", "rank-00000.safetensors"]
    assert_is(tmp_path / "step-00000005", 5)


def test_elements_that_nobody_or_two_ranks_save_are_refused_by_name(tmp_path):
    with Fleet(tmp_path) as fleet:
        fleet.step(1)
        states = [rank_state(2, rank, 3) for rank in range(3)]
        states[1].shards[1].owner = False
        assert "'exp_avg.norm.weight': 20 of 60 elements" in str(fleet.save(states, 2)[0].error)
        states = [rank_state(3, rank, 3) for rank in range(3)]
        states[2].shards[2].owner = True
        error = str(fleet.save(states, 3)[0].error)
        assert "'count': rank-00001.safetensors and rank-00002.safetensors hold the same" in error
        assert names(tmp_path) == ["step-00000001"]
        assert fleet.step(4)[0].error is None


def test_what_a_crash_left_is_neither_used_nor_kept(tmp_path):
    stale = tmp_path / folders.Attempt("crashed", 1).temporary(folders.name_of(10))
    with Fleet(tmp_path, nonce="crashed"):
        stale.mkdir()
        for rank in range(3):
            (stale / part_name(rank)).write_bytes(b"nonsense")
    with Fleet(tmp_path, nonce="second") as fleet:
        assert names(tmp_path) == []
        stale.mkdir()
        assert fleet.step(10)[0].error is None
    assert names(tmp_path) == ["step-00000010"]
    assert_is(tmp_path / "step-00000010", 10)


def test_a_rank_that_does_not_come_is_named(tmp_path):
    with Fleet(tmp_path, world=2, timeout=0.2) as fleet:
        pending = fleet.savers[0].save(rank_state(1, 0, 2), 1)
        assert pending.wait(20)
        assert "rank 1 has not written its part" in str(pending.error)
        assert names(tmp_path) == []


def test_nothing_is_pickled(tmp_path, monkeypatch):
    """Here every entry to pickle fails; in the helper, a hook kills it."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickled")

    for name in ("loads", "load", "Unpickler", "_Unpickler", "dumps", "dump", "Pickler", "_Pickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(saver, "_WRITER", "tests.checkpoint.watched")
    with Fleet(tmp_path) as fleet:
        assert all(pending.error is None for pending in fleet.step(4))
    newest_is_whole(tmp_path, 4)


def test_the_helper_starts_without_torch():
    code = "import sys, shoal.checkpoint.writer; print(sorted({'torch', 'numpy', 'pickle'} & {*sys.modules}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_values_that_json_would_change_are_refused(tmp_path):
    with Fleet(tmp_path, world=1) as fleet:
        for value in (float("nan"), (1, 2)):
            with pytest.raises(AssertionError, match="JSON"):
                fleet.savers[0].save(State([], {"value": value}), 1)
