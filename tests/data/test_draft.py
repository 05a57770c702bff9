"""Folders for work under way: gone at the end, swept up when their process was killed, left alone while it lives."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shoal.data import draft as module
from shoal.data.draft import draft, publish

_WORK = """
import sys, time
from pathlib import Path
from shoal.data import draft as module
from shoal.data.draft import draft, publish
with draft(Path(sys.argv[1])) as folder:
    (folder / "new").mkdir()
    print(folder, flush=True)
    time.sleep(600)
"""


def test_a_draft_ends_with_the_work(tmp_path):
    def work() -> None:
        with draft(tmp_path) as folder:
            (folder / "half").write_text("made")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_leaves_is_swept_up_by_the_next_and_not_before(tmp_path):
    worker = subprocess.Popen([sys.executable, "-c", _WORK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    theirs = tmp_path / worker.stdout.readline().strip()
    with draft(tmp_path) as ours:
        assert sorted(tmp_path.iterdir()) == sorted([ours, theirs])
    assert (theirs / "new").is_dir()
    worker.kill()
    worker.wait()
    assert theirs.is_dir()
    with draft(tmp_path) as ours:
        assert list(tmp_path.iterdir()) == [ours]


def test_a_folder_gets_its_name_when_all_of_it_is_on_disk(tmp_path, monkeypatch):
    made, target, synced = tmp_path / "made", tmp_path / "target", []
    made.mkdir()
    for name in ("one", "two"):
        (made / name).write_text(name)
    sync = module.sync
    monkeypatch.setattr(module, "sync", lambda path: (synced.append((path.name, target.exists())), sync(path)))
    publish(made, target)
    assert sorted(synced[:2]) == [("one", False), ("two", False)]
    assert synced[2:] == [("made", False), (tmp_path.name, True)]
    (tmp_path / "other").mkdir()
    with pytest.raises(OSError, match=r"not empty|exists"):
        publish(tmp_path / "other", target)
    assert (target / "one").read_text() == "one"
