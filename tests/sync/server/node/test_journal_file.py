"""The coordinator's journal on a disk: what is left of it after a crash, also one while it begins anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.errors import CheckpointError
from shoal.sync.server import journal
from shoal.sync.server import records as r
from shoal.sync.server.messages import Key, Range
from shoal.sync.server.node.journal_file import JournalFile

OPENED = r.Opened("job")


def commit(version: int) -> r.Committed:
    samples = Range(version - 1, version)
    return r.Committed(version, (Key(0, 0, version - 1),), (0,), (1.0,), (samples,), 0.5, 1.0, 0.1)


def opened_at(version: int) -> list[r.AnyRecord]:
    return [r.Opened("job", version, version)]


def kept(folder: Path) -> list[r.AnyRecord]:
    """What another process would find there."""
    file = JournalFile(folder)
    file.close()
    return file.records


@pytest.fixture
def three(tmp_path):
    """With an opening and two commits."""
    file = JournalFile(tmp_path)
    file.append([OPENED, commit(1)], durable=True)
    file.append([commit(2)], durable=False)
    yield file
    file.close()


def test_it_goes_on_where_it_was(three, tmp_path):
    assert three.records == [], "of what was there before"
    assert kept(tmp_path) == [OPENED, commit(1), commit(2)]
    assert kept(tmp_path / "new" / "folder") == []


def test_a_torn_tail_is_cut_off_and_written_over(three, tmp_path):
    whole = three.path.read_bytes()
    for size in range(len(whole) - len(journal.encode([commit(2)])), len(whole)):
        three.path.write_bytes(whole[:size])
        again = JournalFile(tmp_path)
        assert again.records == [OPENED, commit(1)]
        again.append([commit(2)], durable=True)
        again.close()
        assert three.path.read_bytes() == whole
    three.path.write_bytes(journal.MAGIC[:5])
    assert kept(tmp_path) == []
    assert three.path.read_bytes() == journal.MAGIC


def test_damage_before_whole_records_is_said_with_the_file(three, tmp_path):
    data = bytearray(three.path.read_bytes())
    data[len(journal.MAGIC) + 12] ^= 1
    three.path.write_bytes(data)
    with pytest.raises(CheckpointError, match="before records that are whole") as caught:
        JournalFile(tmp_path)
    assert caught.value.where == str(three.path)


def test_it_begins_anew_at_a_mark_with_what_has_followed(three, tmp_path):
    three.mark(2, opened_at(2))
    three.append([commit(3)], durable=True)
    three.mark(3, opened_at(3))
    three.append([commit(4)], durable=True)
    three.restart(7)
    assert kept(tmp_path) == [OPENED, *map(commit, (1, 2, 3, 4))], "nothing happens at a version without a mark"
    three.restart(2)
    assert kept(tmp_path) == [*opened_at(2), commit(3), commit(4)]
    three.append([commit(5)], durable=True)
    three.restart(2)
    assert kept(tmp_path) == [*opened_at(2), *map(commit, (3, 4, 5))], "once"
    three.restart(3)
    three.append([commit(6)], durable=False)
    assert kept(tmp_path) == [*opened_at(3), *map(commit, (4, 5, 6))]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_while_it_begins_anew_leaves_the_old_one(three, tmp_path, monkeypatch, call):
    """The new one is written, wholly or in part, and is not there yet."""
    three.mark(2, opened_at(2))
    three.append([commit(3)], durable=True)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, call, crash)
        with pytest.raises(KeyboardInterrupt):
            three.restart(2)
    assert (tmp_path / "journal.new").exists()
    again = JournalFile(tmp_path)
    assert again.records == [OPENED, *map(commit, (1, 2, 3))]
    again.mark(3, opened_at(3))
    again.restart(3)
    again.close()
    assert kept(tmp_path) == opened_at(3)
    assert not (tmp_path / "journal.new").exists()
