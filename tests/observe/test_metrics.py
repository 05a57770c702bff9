"""metrics.jsonl holds each step once, whatever kill, resume or full disk came between."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.observe.metrics import FILE, Metrics, read
from tests.observe.rows import row

rows_of_a_run = st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=12)


def write(folder: Path, rows, step: int = 0) -> None:
    metrics = Metrics(folder, step)
    for one in rows:
        metrics.write(one)
    metrics.close()


@settings(deadline=None)
@given(rows_of_a_run, st.data())
def test_a_file_torn_at_any_byte_keeps_every_whole_line(losses, data):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
        write(folder, rows)
        text = (folder / FILE).read_bytes()
        cut = data.draw(st.integers(0, len(text)))
        (folder / FILE).write_bytes(text[:cut])
        # A line without its line break is whole if its object is.
        ends = [i for i in range(len(text)) if text[i : i + 1] == b"\n"]
        whole = sum(end <= cut for end in ends)
        assert read(folder) == rows[:whole]
        # Whoever goes on writes the next row on a line of its own.
        more = {"step": whole + 1, "loss": 0.5}
        write(folder, [more], step=whole)
        assert read(folder) == [*rows[:whole], more]
        assert all(json.loads(line) for line in (folder / FILE).read_text().splitlines())


@settings(deadline=None)
@given(rows_of_a_run, st.data())
def test_going_on_at_a_step_leaves_the_whole_rows_up_to_it(losses, data):
    """Of any byte prefix of the file, and byte for byte: nothing is written anew, so nothing can get lost."""
    rows = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, rows)
        text, before = (folder / FILE).read_bytes(), (folder / FILE).stat().st_ino
        cut, step = data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(rows) + 1))
        os.truncate(folder / FILE, cut)
        Metrics(folder, step).close()
        lines = text.splitlines(keepends=True)
        # A row is whole without its line break, which it then gets.
        whole = sum(len(b"".join(lines[: n + 1])) - 1 <= cut for n in range(len(lines)))
        assert (folder / FILE).read_bytes() == b"".join(lines[: min(whole, step)])
        assert (folder / FILE).stat().st_ino == before


def test_a_torn_line_between_rows_is_no_end(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"step":1}\n{"st\n{"step":2}\n{"step":3}\n{"ste')
    Metrics(tmp_path, 2).close()
    assert read(tmp_path) == [{"step": 1}, {"step": 2}]
    assert (tmp_path / FILE).read_bytes().endswith(b'{"step":2}\n')


@settings(deadline=None)
@given(st.integers(1, 20), st.data())
def test_each_step_once_after_resumes(steps, data):
    """Runs that are killed anywhere and go on from an earlier checkpoint leave every step once, in order."""
    with tempfile.TemporaryDirectory() as name:
        folder, start, written = Path(name), 0, 0
        for attempt in range(4):
            end = steps if attempt == 3 else data.draw(st.integers(start, steps))
            write(folder, [{"step": s, "attempt": attempt} for s in range(start + 1, end + 1)], step=start)
            written = end
            assert [r["step"] for r in read(folder)] == list(range(1, written + 1))
            if attempt < 3:
                start = data.draw(st.integers(0, written))
        # The rows after the last checkpoint are those of the last attempt, not of the one that was killed.
        assert all(r["attempt"] == 3 for r in read(folder)[start:])


def test_what_json_lacks_is_null(tmp_path):
    write(tmp_path, [row(1, loss=math.nan, grad_norm=math.inf)])
    text = (tmp_path / FILE).read_text()
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert found["loss"] is None
    assert found["grad_norm"] is None


def test_rows_are_on_disk_before_the_file_is_closed(tmp_path):
    metrics = Metrics(tmp_path)
    metrics.write(row(1))
    assert [r["step"] for r in read(tmp_path)] == [1]
    metrics.close()


def test_a_write_that_the_disk_cuts_short_leaves_no_torn_line(tmp_path, monkeypatch):
    metrics = Metrics(tmp_path)
    metrics.write(row(1))
    real = os.write
    monkeypatch.setattr(os, "write", lambda file, data: real(file, data[:10]))
    with pytest.raises(OSError, match="No space"):
        metrics.write(row(2))
    monkeypatch.undo()
    metrics.write(row(3))
    metrics.close()
    assert [r["step"] for r in read(tmp_path)] == [1, 3]
    assert len((tmp_path / FILE).read_text().splitlines()) == 2


def test_foreign_lines_are_passed_over(tmp_path):
    foreign = [b"\xff", b'{"step": 1, "a": "\xff"}', b"[1]", b'{"loss": 1}', b'{"step": "x"}', b"null"]
    (tmp_path / FILE).write_bytes(b"\n".join([*foreign, b'{"step": 7}', b"", b'{"st']))
    assert read(tmp_path) == [{"step": 7}]


def test_no_file_no_rows(tmp_path):
    assert read(tmp_path) == []
