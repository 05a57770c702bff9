"""Show keeps rows and sentences, and lets nothing that fails while doing so end the training."""

from __future__ import annotations

import errno
import re
import subprocess
import sys

import pytest

from shoal.errors import ShoalError
from shoal.observe import environment, metrics
from shoal.observe.hold import held, hold
from shoal.observe.show import Show
from tests.observe.rows import row


class Validation:
    nats = 2.5
    tokens = 12_000


def test_rows_log_and_progress(tmp_path, capsys):
    with Show(tmp_path) as show:
        show.say("precision [bf16]: 12 ms\nsecond line")
        show.begin(0, 2, 2, 5e9, 3e6)
        show.step(row(1))
        show.step(row(2))
        show.end(2, Validation())
    kept = metrics.read(tmp_path)
    assert [r["step"] for r in kept] == [1, 2]
    assert kept[0]["mfu"] == pytest.approx(2000 * 3e6 / (2 * 5e9))
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d ", line) for line in log)
    said = [line.split(" ", 1)[1] for line in log]
    assert said[:2] == ["precision [bf16]: 12 ms", "second line"]
    assert said[2] == show.note
    assert said[-1] == "step 2 of 2 is done; validation loss 2.5000 nats per token, over 12,000 tokens"
    shown = capsys.readouterr().out
    assert "precision [bf16]: 12 ms" in shown
    assert "step 2/2  100.0 %" in shown
    assert show.note in shown


def test_a_resumed_run_replaces_what_came_after_its_checkpoint(tmp_path):
    for first, last in ((0, 3), (1, 2)):
        with Show(tmp_path) as show:
            show.begin(first, 10, 1, None, 3e6)
            for step in range(first + 1, last + 1):
                show.step(row(step, loss=first))
            show.end(last, None)
    assert [(r["step"], r["loss"], r["mfu"]) for r in metrics.read(tmp_path)] == [(1, 0, None), (2, 1, None)]


def test_a_run_without_an_end(tmp_path):
    with Show(tmp_path) as show:
        show.begin(0, 0, 1, None, 3e6)
        show.step(row(1))
        show.end(1, None)
    assert (tmp_path / "log.txt").read_text().endswith(" step 1 is done\n")


def test_a_quiet_one_does_nothing(tmp_path, capsys):
    with Show(tmp_path, quiet=True) as show:
        show.say("hello")
        show.begin(0, 1, 1, None, 1.0)
        show.step(row(1))
        show.end(1, None)
    assert show.note == ""
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_once_and_training_goes_on(tmp_path, capsys, monkeypatch):
    def full(self, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Show(tmp_path) as show:
        show.begin(0, 3, 1, None, 1.0)
        monkeypatch.setattr("shoal.observe.metrics.Metrics.write", full)
        monkeypatch.setattr("shoal.observe.log.Log.write", full)
        for step in (1, 2, 3):
            show.step(row(step))
    shown = capsys.readouterr().out
    assert shown.count("No space left on device") == 1
    assert "step 3/3" in shown


@pytest.mark.parametrize("log_too", [False, True])
def test_metrics_that_cannot_be_opened_are_told_once(tmp_path, capsys, monkeypatch, log_too):
    def full(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("shoal.observe.show.Metrics", full)
    if log_too:
        monkeypatch.setattr("shoal.observe.log.Log.write", full)
    with Show(tmp_path) as show:
        show.begin(0, 2, 1, None, 1.0)
        for step in (1, 2):
            show.step(row(step))
        show.end(2, None)
    shown = capsys.readouterr().out
    assert shown.count("Read-only file system") == 1
    assert "step 2/2" in shown
    assert "step 2 of 2 is done" in shown


_RESUMED_ON_A_FULL_DISK = """
import resource, sys
from pathlib import Path
from shoal.observe import environment
from shoal.observe.show import Show
from tests.observe.rows import row

folder, size = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
with Show(folder) as show:
    environment.record(folder, {"threads": 1, "command": ["x" * size]}, show.say)
    show.begin(5, 9, 1, None, 1.0)
    for step in range(6, 10):
        show.step(row(step, attempt=2))
    show.end(9, None)
"""


@pytest.mark.parametrize(("rows", "fit"), [(7, [(6, 2)]), (3, [])])
def test_a_run_goes_on_in_files_that_may_not_grow(tmp_path, rows, fit):
    """A real limit, of the operating system's: within the rows after the checkpoint, or within those before it."""
    environment.write(tmp_path, {"threads": 1})
    with Show(tmp_path) as show:
        show.begin(0, 9, 1, None, 1.0)
        for step in range(1, 10):
            show.step(row(step))
    lines = (tmp_path / metrics.FILE).read_bytes().splitlines(keepends=True)
    limit = len(b"".join(lines[:rows]))
    (tmp_path / "log.txt").write_bytes(b"x" * limit)
    done = subprocess.run(
        [sys.executable, "-c", _RESUMED_ON_A_FULL_DISK, str(tmp_path), str(limit)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot write the run's log and metrics (File too large)") == 1
    assert done.stdout.count("cannot write environment.json (File too large)") == 1
    assert "step 9 of 9 is done" in done.stdout
    # Of the rows before the checkpoint none is touched; of those after it, the ones that fit are there, whole.
    kept = (tmp_path / metrics.FILE).read_bytes()
    assert kept.startswith(b"".join(lines[:5]))
    assert [(r["step"], r.get("attempt")) for r in metrics.read(tmp_path)[5:]] == fit
    assert kept.endswith(b"}\n")
    assert environment.read(tmp_path) == {"threads": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"environment.json", "log.txt", metrics.FILE}


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with hold(tmp_path):
        assert not held(tmp_path)


def test_one_process_at_a_time_holds_a_run(tmp_path):
    assert not held(tmp_path)
    with Show(tmp_path):
        assert held(tmp_path)
        with pytest.raises(ShoalError, match="another process"), hold(tmp_path, patience=0):
            pass
    assert not held(tmp_path)
    with Show(tmp_path):
        pass


def test_an_error_inside_lets_go_of_the_run(tmp_path):
    def fails() -> None:
        with Show(tmp_path) as show:
            show.begin(0, 3, 1, None, 1.0)
            show.step(row(1))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert not held(tmp_path)
    assert [r["step"] for r in metrics.read(tmp_path)] == [1]
