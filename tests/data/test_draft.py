"""Folders for work under way: gone at the end, swept up when their process was killed, left alone while it lives."""

from __future__ import annotations

import subprocess
import sys

import pytest

from shoal.data.draft import draft

_WORK = """
import sys, time
from pathlib import Path
from shoal.data.draft import draft
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
