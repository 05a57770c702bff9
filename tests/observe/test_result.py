"""result.json and the line for scripts."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import replace

import pytest

from shoal.observe import result
from shoal.observe.result import Result

RESULT = Result(
    run="runs/x", steps=3, tokens=3000, loss_first=8.0, loss_last=math.nan, val_loss=None, bits_per_byte=None,
    tokens_per_second=2000.0, mfu=0.4, seconds=2.5, sample="a sample",
)  # fmt: skip


def test_the_line_for_scripts_has_exactly_these_keys():
    line = RESULT.line()
    assert "\n" not in line
    assert list(json.loads(line)) == [
        "run", "steps", "tokens", "loss_first", "loss_last", "val_loss", "bits_per_byte", "tokens_per_second",
        "mfu", "seconds",
    ]  # fmt: skip
    assert json.loads(line)["loss_last"] is None


def test_what_is_written_is_read(tmp_path):
    result.write(tmp_path, RESULT)
    assert result.read(tmp_path) == replace(RESULT, loss_last=None)
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_missing_or_torn_is_none(tmp_path):
    assert result.read(tmp_path) is None
    result.write(tmp_path, RESULT)
    text = (tmp_path / "result.json").read_bytes()
    for cut in (0, 10, len(text) // 2):
        (tmp_path / "result.json").write_bytes(text[:cut])
        assert result.read(tmp_path) is None


def test_a_result_from_before_the_last_row_is_not_current(tmp_path):
    assert result.current(tmp_path, 0) is None
    result.write(tmp_path, RESULT)
    assert [last for last in (0, 2, 3, 4) if result.current(tmp_path, last)] == [0, 2, 3]


@pytest.mark.parametrize(
    ("done", "steps", "state"),
    [
        (None, 3, "failed"),
        (RESULT, 3, "finished"),
        (RESULT, 4, "stopped"),
        (replace(RESULT, stopped_by="SIGINT"), 4, "stopped"),
        # The signal came during the last step.
        (replace(RESULT, stopped_by="SIGINT"), 3, "finished"),
        # job.toml is damaged.
        (RESULT, None, "finished"),
        (replace(RESULT, stopped_by="SIGINT"), None, "stopped"),
    ],
)
def test_state(done, steps, state):
    assert result.state(done, steps) == state


def test_what_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    result.write(tmp_path, RESULT)

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        result.write(tmp_path, replace(RESULT, steps=9))
    assert result.read(tmp_path).steps == 3
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
