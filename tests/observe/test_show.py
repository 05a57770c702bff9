"""Show keeps rows and sentences, and lets nothing that fails while doing so end the training."""

from __future__ import annotations

import errno
import re

import pytest

from shoal.errors import ShoalError
from shoal.observe import metrics
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
