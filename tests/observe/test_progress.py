"""What is shown equals what one computes by hand, on a terminal of any width and in a file."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from shoal.observe.mfu import Mfu
from shoal.observe.progress import Lasting, Progress
from tests.observe.rows import row, server_row, waiting_row

# 3e6 operations a token on two devices of 5 GFLOP/s.
MFU = Mfu(flops_per_token=3e6, devices=2, peak=5e9)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def plain(steps: int, rows, seconds_each: float = 0.5, mfu: Mfu = MFU, first: int = 0) -> list[str]:
    """The lines that a run of these rows prints when there is no terminal."""
    out, clock = io.StringIO(), Clock()
    progress = Progress(Console(file=out), steps, mfu, first, clock)
    for one in rows:
        clock.now += seconds_each
        progress.step(one)
    progress.close()
    return out.getvalue().splitlines()


def terminal(width: int, rows, steps: int = 100, encoding: str = "utf-8") -> str:
    """Everything that is sent to a terminal."""
    out, clock = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True), Clock()
    console = Console(file=out, force_terminal=True, width=width, height=30, color_system=None)
    progress = Progress(console, steps, MFU, clock=clock)
    for one in rows:
        clock.now += 0.5
        progress.step(one)
    progress.close()
    return out.buffer.getvalue().decode(encoding)


def last_frame(sent: str) -> list[str]:
    """The lines that are left on the terminal."""
    return [line.rstrip() for line in re.split(r"\x1b\[2K|\x1b\[1A|\r", sent)[-1].splitlines()]


def test_first_line_by_hand():
    (line,) = plain(4, [row(1, loss=2.5)])
    # 1000 tokens in 0.5 s; MFU = 2000 · 3e6 / (2 · 5e9) = 60 %; three steps of 0.5 s are left.
    assert line == (
        "step 1/4  25.0 %  loss 2.500  2,000 tok/s  1,000 tok/s per device  MFU 60.0 %  grad norm 2  "
        "lr 1.00e-03  ETA 0:02"
    )


def test_figures_after_several_steps_by_hand():
    rows = [row(1, loss=4.0, seconds=1.0), row(2, loss=2.0, seconds=0.5, tokens=500, val_loss=3.25)]
    line = plain(42, rows, seconds_each=3.0)[-1]
    # Bias-corrected mean with beta 0.9: (0.9·4 + 2) / 1.9; 1500 tokens in 1.5 s; 40 steps of 3 s.
    assert "loss 2.947" in line
    assert "  1,000 tok/s  500 tok/s per device  MFU 30.0 %" in line
    assert "val loss 3.250" in line
    assert line.endswith("ETA 2:00")


def test_a_replica_that_keeps_others_waiting_is_named():
    """From three exchanges on, the last twenty; of the time since the first of them, steps without one too."""
    slow = [waiting_row(s, 0.2, 0.0, 0.05) for s in range(1, 4)]
    assert "waiting for" not in plain(100, slow[:2])[-1]
    assert "  waiting for replica 1: 40.0 %  lr" in plain(100, slow)[-1]
    seldom = [waiting_row(s, 0.2, 0.0, 0.05) if s % 2 == 0 else row(s) for s in range(1, 7)]
    assert "waiting for replica 1: 20.0 %" in plain(6, seldom)[-1]
    # Each for the other in turn, and for one that was slow before.
    turns = [waiting_row(s, 0.2 * (s % 2), 0.2 * (1 - s % 2)) for s in range(4, 24)]
    assert "waiting for" not in plain(23, turns)[-1]
    assert "waiting for" not in plain(26, [*slow, *turns])[-1]
    # Workers of a server are not bound to come together.
    assert "waiting for" not in plain(4, [server_row(s, {0: 2}, waited_s={"0": 0.4, "1": 0}) for s in range(1, 5)])[-1]


def test_speed_is_that_of_the_last_twenty_steps():
    rows = [row(1, seconds=60.0)] + [row(s) for s in range(2, 22)]
    assert " 2,000 tok/s" in plain(100, rows)[-1]


def test_a_resumed_run_counts_on():
    lines = plain(1000, [row(501), row(502)], first=500)
    assert lines[0].startswith("step 501/1,000  50.1 %")


def test_lines_are_few_and_have_first_last_validations_and_tenths():
    rows = [row(s) | ({"val_loss": 5.0} if s == 37 else {}) for s in range(1, 101)]
    shown = [int(re.match(r"step (\d+)/", line)[1]) for line in plain(100, rows, seconds_each=0.01)]
    assert shown == [1, 10, 20, 30, 37, 40, 50, 60, 70, 80, 90, 100]


def test_slow_steps_are_shown_every_five_seconds_at_first_and_less_often_later():
    count = 20_000
    lines = plain(10**6, (row(s) for s in range(1, count + 1)), seconds_each=1.0)
    shown = [int(re.match(r"step ([\d,]+)/", line)[1].replace(",", "")) for line in lines]
    assert shown[:3] == [1, 6, 11]
    assert shown[-2] - shown[-3] == pytest.approx(count / 100, rel=0.05)


def test_a_run_that_is_stopped_shows_its_last_step_once():
    lines = plain(1000, [row(1), row(2), row(3)], seconds_each=0.01)
    assert [line.split()[1] for line in lines] == ["1/1,000", "3/1,000"]


def test_a_run_without_an_end_has_neither_a_share_nor_a_time_left(capsys):
    lines = plain(0, [row(s) for s in range(1, 31)])
    assert lines[0].startswith("step 1 (no end)  loss ")
    assert lines[0].endswith("  for 0:00")
    assert [line.split()[1] for line in lines] == ["1", "11", "21", "30"]
    frame = last_frame(terminal(120, [row(1), row(1240)], steps=0))
    assert frame[0] == "step 1,240 (no end)"
    assert "ETA" not in "".join(frame)


def test_no_mfu_without_a_peak_and_no_share_of_one_device():
    (line,) = plain(4, [row(1)], mfu=Mfu(3e6, 1, None))
    assert "MFU" not in line
    assert "per device" not in line


def test_nan_is_shown_as_such_and_not_averaged():
    lines = plain(2, [row(1, loss=math.nan, grad_norm=math.nan), row(2, loss=2.0)])
    assert "loss –" in lines[0]
    assert "grad norm nan" in lines[0]
    assert "loss 2.000" in lines[1]


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_a_terminal_shows_every_figure_unbroken_within_its_width(width):
    frame = last_frame(terminal(width, [row(s) for s in range(1, 51)]))
    assert all(len(line) <= width for line in frame)
    text = "\n".join(frame)
    for figure in ("step 50/100", "2,000 tok/s", "MFU 60.0 %", "grad norm 1.02", "lr 1.00e-03", "ETA 0:25"):
        assert figure in text
    assert len(frame) <= (3 if width == 200 else 12)


def test_the_bar_is_as_long_as_the_share_that_is_done():
    frame = last_frame(terminal(120, [row(s) for s in range(1, 26)], encoding="ascii"))
    assert frame[0].count("#") == 10
    assert frame[0].count(".") - "25.0 %".count(".") == 30


def test_the_cursor_is_left_visible():
    """A rank that is killed could not bring it back."""
    sent = terminal(80, [row(1)])
    assert sent.rindex("\x1b[?25h") > sent.index("\x1b[?25l")
    assert sent.index("\x1b[?25h") < sent.index("step 1/")


def test_text_goes_above_the_display():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    progress = Progress(console, 10, MFU)
    progress.step(row(1))
    console.print("a warning")
    progress.close()
    end = out.getvalue()
    assert end.rindex("a warning") < end.rindex("step 1/10")


def test_mfu_note_has_formula_and_peak():
    note = MFU.note()
    for part in ("tokens/s", "3 MFLOP per token", "2 devices", "5 GFLOP/s", "measured"):
        assert part in note
    assert "unknown" in Mfu(3e6, 2, None).note()


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_reader_that_left_ends_nothing():
    console = Console(file=Lasting(Broken()))
    progress = Progress(console, 2, MFU)
    progress.step(row(1))
    console.print("still here")
    progress.close()


def test_the_busiest_expert_is_shown_where_there_are_experts():
    (line,) = plain(4, [row(1, busiest_load=1.834)])
    assert "grad norm 2  busiest expert 1.83×  lr" in line
    assert "expert" not in plain(4, [row(1)])[0]


def test_staleness_is_shown_where_gradients_are_late():
    (line,) = plain(4, [server_row(1, {0: 2, 1: 1, 3: 1})])
    assert "grad norm 1  staleness 1.0  lr" in line
    assert "staleness" not in plain(4, [server_row(1, {0: 2})])[0] + plain(4, [server_row(1, {})])[0]
