"""The last lines of a run say what it came to, and commands that work as they stand."""

from __future__ import annotations

import io
import shlex
from dataclasses import replace

from shoal.observe import summary
from shoal.observe.result import Result
from shoal.observe.screen import shown

RESULT = Result(
    run="runs/my run", steps=3000, tokens=3_000_000, loss_first=8.0, loss_last=2.3, val_loss=2.247, bits_per_byte=0.973,
    tokens_per_second=2000.0, mfu=0.453, seconds=231.4, devices=2, prompt="def <main>(", sample="x):",
    gzip_bits_per_byte=1.9, xz_bits_per_byte=1.6,
)  # fmt: skip


def said(result: Result) -> dict[str, str]:
    """Label -> the rest of its line."""
    return {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in summary.lines(result) if line}


def test_figures():
    found = said(RESULT)
    assert found["validation"] == (
        "2.2470 nats per token = 0.973 bits per byte (gzip -9 1.900, xz -9 1.600 on the same text)"
    )
    assert found["speed"] == "2,000 tokens/s on 2 devices, MFU 45.3 %"
    assert found["length"] == "3,000 steps, 3,000,000 tokens; this command took 3:51"
    assert found["report"] == "runs/my run/report.html"
    assert "stopped" not in found


def test_predicted_beside_measured():
    assert "a" not in said(replace(RESULT, step_seconds=0.25))
    found = said(replace(RESULT, step_seconds=0.25, predicted_step_seconds=0.2))
    assert found["a"] == "step       250 ms in the median; 200 ms were predicted, 20 % less"
    assert said(replace(RESULT, step_seconds=0.25, predicted_step_seconds=0.3))["a"].endswith("predicted, 20 % more")


def test_memory():
    assert "memory" not in said(RESULT)
    assert said(replace(RESULT, memory_gib=0.625))["memory"] == "0.62 GiB at most, of the fullest rank"


def test_one_of_each():
    found = said(replace(RESULT, steps=1, tokens=1, devices=1))
    assert found["speed"].startswith("2,000 tokens/s on 1 device,")
    assert found["length"].startswith("1 step, 1 token;")


def test_the_way_on_can_be_copied_and_tells_what_it_does_to_the_schedule():
    way = said(RESULT)["resume"]
    assert shlex.split(way, comments=True) == ["shoal", "train", "--resume", "runs/my run", "--steps", "6000"]
    assert way.endswith("# stretches the learning-rate schedule")


def test_a_stopped_run_goes_on_as_it_was():
    found = said(replace(RESULT, stopped_by="SIGINT"))
    assert "SIGINT" in found["stopped"]
    assert shlex.split(found["resume"]) == ["shoal", "train", "--resume", "runs/my run"]


def test_a_sample_gives_the_terminal_no_commands():
    written = replace(RESULT, prompt="", sample="a\tb\x1b[2J\x03\n\x0cc\x9b\r\x7f\n")
    lines = summary.lines(written)
    assert lines[2:4] == ["  │ a\tb\\x1b[2J\\x03", "  │ \\x0cc\\x9b\\x0d\\x7f"]


def test_a_file_gets_the_text_as_it_is():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert shown("a\x1b\n", io.StringIO()) == "a\x1b\n"
    assert shown("a\x1b\n", Terminal()) == "a\\x1b\n"
