"""What workers have pushed to a shard, on a disk: read back bitwise, up to what is torn or damaged."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from shoal.sync.server import messages as m
from shoal.sync.server.messages import Key, Piece
from shoal.sync.server.node.shard_log import ShardLog

PIECES = (Piece("embed", (2, 0), (3, 4)), Piece("scale", (), ()))


def push(clock: int) -> tuple[m.Stage, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(clock)
    tensors = torch.randn(4, 3, generator=generator).T, torch.randn((), generator=generator)
    return m.Stage(Key(0, 0, clock), 0, 1, PIECES), tensors


def clocks(folder: Path) -> list[int]:
    """Of the pushes that another process would find, each of which is as it was."""
    log = ShardLog(folder, torch.float32)
    found = list(log.read())
    log.close()
    for stage, tensors in found:
        right, values = push(stage.key.clock)
        assert stage == right
        assert all(torch.equal(a, b) for a, b in zip(tensors, values, strict=True))
    return [stage.key.clock for stage, _ in found]


@pytest.fixture
def log(tmp_path):
    """With three pushes, the last two in another segment."""
    log = ShardLog(tmp_path, torch.float32)
    log.append(*push(0), durable=True)
    log.turn(5)
    log.append(*push(1), durable=False)
    log.append(*push(2), durable=True)
    yield log
    log.close()


def segment(folder: Path, version: int) -> Path:
    return folder / f"{version:010}.log"


def test_all_segments_are_read_in_their_order(log, tmp_path):
    log.turn(5)
    log.turn(12)
    log.append(*push(3), durable=True)
    assert clocks(tmp_path) == [0, 1, 2, 3]
    assert clocks(tmp_path / "new") == []


def test_a_torn_tail_is_cut_off_and_written_over(log, tmp_path):
    path = segment(tmp_path, 5)
    whole = path.read_bytes()
    for size in range(len(whole) // 2, len(whole), 7):
        path.write_bytes(whole[:size])
        again = ShardLog(tmp_path, torch.float32)
        assert [stage.key.clock for stage, _ in again.read()] == [0, 1]
        again.append(*push(2), durable=True)
        again.close()
        assert path.read_bytes() == whole


@pytest.mark.parametrize("place", [6, 30, -30])
def test_a_damaged_byte_ends_its_segment(log, tmp_path, place):
    """Of the length, of the header, of a tensor."""
    path = segment(tmp_path, 5)
    data = bytearray(path.read_bytes())
    data[place + (len(data) // 2 if place < 0 else 0)] ^= 4
    path.write_bytes(data)
    assert clocks(tmp_path) == [0]


def test_segments_before_a_checkpoint_are_forgotten_never_the_one_that_is_written(log, tmp_path):
    log.forget(0)
    assert clocks(tmp_path) == [0, 1, 2]
    log.forget(5)
    assert clocks(tmp_path) == [1, 2]
    log.forget(99)
    log.append(*push(3), durable=True)
    assert clocks(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("written", [0, 3, 60, 100])
def test_of_a_full_disk_nothing_is_left(log, tmp_path, monkeypatch, written):
    """So that what comes later, when there is space, is found."""
    real, left = os.write, [written]

    def write(file: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(file, data[: left[0]])
        left[0] -= done
        return done

    before = segment(tmp_path, 5).read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        with pytest.raises(OSError, match="No space left"):
            log.append(*push(3), durable=True)
    assert segment(tmp_path, 5).read_bytes() == before
    log.append(*push(4), durable=True)
    assert clocks(tmp_path) == [0, 1, 2, 4]
