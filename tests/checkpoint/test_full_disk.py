"""A disk that is full, or may not be written to: what was saved stays, and training goes on."""

from __future__ import annotations

import os
import resource
import subprocess

import pytest

from shoal import checkpoint
from shoal.checkpoint import writer
from tests.checkpoint.fleet import LARGE, Fleet, assert_is, names, rank_state


def check_full(fleet: Fleet, rank: int, make_full, make_room, reason: str) -> None:
    assert fleet.step(1)[0].error is None
    make_full()
    pending = fleet.step(2, LARGE)
    assert reason in str(pending[rank].error)
    assert "step 2 was not saved" in str(pending[0].error)
    assert reason in str(pending[0].error)
    assert "step-00000002" in str(pending[0].error)
    assert names(fleet.root) == ["step-00000001"]
    assert checkpoint.newest(fleet.root, pytest.fail) == fleet.root / "step-00000001"
    assert_is(fleet.root / "step-00000001", 1)
    make_room()
    assert fleet.step(3)[0].error is None
    assert_is(fleet.root / "step-00000003", 3)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
@pytest.mark.parametrize("rank", [0, 2])
def test_a_file_that_may_not_grow(tmp_path, rank):
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    with Fleet(tmp_path) as fleet:

        def limit(size) -> None:
            resource.prlimit(fleet.helper(rank), resource.RLIMIT_FSIZE, size)

        check_full(fleet, rank, lambda: limit((60_000, unlimited[1])), lambda: limit(unlimited), "File too large")


def test_a_full_disk(tmp_path):
    """A file system of 200 kB, in memory; needs the right to mount."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        with Fleet(tmp_path) as fleet:
            check_full(fleet, 0, lambda: None, lambda: None, "No space left on device")
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_no_space_at_any_moment(tmp_path, monkeypatch):
    """Every wait for the disk fails in turn, in the helper's own code run in this process."""
    real, left = os.fsync, 0

    def fsync(file: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(28, "No space left on device")
        real(file)

    with Fleet(tmp_path, world=1, keep=1) as fleet:
        fleet.step(1)
        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(fleet.savers[0]._helper, "send", lambda order: orders.append(order))
        failures = 0
        while True:
            orders: list = []
            fleet.savers[0]._pending = None
            fleet.savers[0].save(rank_state(2, 0, 1), 2)
            left = failures + 1
            report = writer.obey(orders[0], fleet.savers[0]._memory.file)
            if not report.error:
                break
            failures += 1
            assert "No space left" in report.error
            assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
            assert_is(tmp_path / names(tmp_path)[0], 1)
            if len(names(tmp_path)) > 1:
                # Only the last waits, for the name itself and its folder's, come after the new one was complete.
                assert_is(tmp_path / names(tmp_path)[1], 2)
        fleet.savers[0]._pending = None
    assert failures == 6
    assert [name[:13] for name in names(tmp_path)] == ["step-00000002"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with Fleet(tmp_path / "file" / "checkpoints", world=1) as fleet:
        pending = fleet.step(1)[0]
        assert "step 1 was not saved: Not a directory" in str(pending.error)
        assert str(tmp_path / "file") in str(pending.error)
