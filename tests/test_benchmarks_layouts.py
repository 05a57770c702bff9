"""The benchmark of layouts compares like with like, and the commands run."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest
import torch
from benchmarks import bubble, layouts

from shoal.mesh import Seat

# Relative, over five steps in fp32. Reordered sums move these losses by some 1e-7.
BOUND = 1e-5
STEPS = 5


def losses(ranks, row: str, contender: str) -> list[float]:
    return ranks.run("benchmarks.layouts:losses", 2, row=row, contender=contender, size="tiny", steps=STEPS)[0]


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) / y for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("row", layouts.LAYOUTS)
def test_by_hand_computes_the_same_as_shoal(ranks, row: str) -> None:
    ours, theirs = losses(ranks, row, "shoal"), losses(ranks, row, "by hand")
    assert ours[-1] < ours[0] - 0.05
    assert largest_difference(theirs, ours) < BOUND


def wrong_losses(seat: Seat, row: str, bug: str) -> list[float]:
    """By hand, with a bug."""
    rate = mock.patch.object(layouts, "adamw", _adamw_1_percent_faster)
    label = mock.patch.object(layouts, "tokens", _tokens_with_a_wrong_label)
    with {"rate": rate, "label": label}[bug]:
        return layouts.losses(seat, row, "by hand", "tiny", STEPS)


_adamw, _tokens = layouts.adamw, layouts.tokens


def _adamw_1_percent_faster(*args: Any) -> torch.optim.Optimizer:
    optimizer = _adamw(*args)
    for group in optimizer.param_groups:
        group["lr"] *= 1.01
    return optimizer


def _tokens_with_a_wrong_label(size: layouts.Size) -> tuple[torch.Tensor, torch.Tensor]:
    tokens_BL, labels_BL = _tokens(size)
    labels_BL[-1, -1] = (labels_BL[-1, -1] + 1) % size.vocab
    return tokens_BL, labels_BL


@pytest.mark.parametrize(("row", "bug"), [("fsdp", "rate"), ("tensor", "label"), ("pipeline", "rate")])
def test_the_bound_catches_planted_bugs(ranks, row: str, bug: str) -> None:
    ours = losses(ranks, row, "shoal")
    wrong = ranks.run("tests.test_benchmarks_layouts:wrong_losses", 2, row=row, bug=bug)[0]
    assert largest_difference(wrong, ours) > 5 * BOUND


@pytest.mark.nightly
def test_the_command_of_layouts(monkeypatch, capsys) -> None:
    arguments = ["--rows", "pipeline", "--size", "tiny", "--blocks", "2", "--starts", "1", "--format", "json"]
    monkeypatch.setattr("sys.argv", ["layouts.py", *arguments])
    layouts.main()
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert {name: len(column) for name, column in row["seconds"].items()} == {
        "shoal": 2, "by hand": 2, "shoal again": 2,
    }  # fmt: skip
    assert row["layout"] == "pipeline=2,micro_batch=1,schedule=1f1b"
    mean = sum(row["seconds"]["shoal"]) / 2
    assert row["shoal"] == pytest.approx(8 * 16 / mean, rel=0.01)
    assert {"by_hand", "ratio", "ratio_low", "aa", "memory"} <= set(row)


def test_the_command_of_bubbles(ranks, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bubble, "Pool", lambda _: mock.MagicMock(__enter__=lambda _: ranks))
    arguments = ["--schedules", "1f1b,zbv", "--milliseconds", "1", "--repetitions", "2", "--format", "json"]
    monkeypatch.setattr("sys.argv", ["bubble.py", *arguments])
    # How near they come is a matter of the machine, and what the exit code says.
    with pytest.raises(SystemExit) as ended:
        bubble.main()
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["schedule"] for row in rows] == ["1f1b", "zbv"]
    assert rows[0]["simulated"] == pytest.approx(3 / 11)
    assert rows[1]["formula"] is None
    assert ended.value.code == (not all(row["within"] for row in rows))
    for row in rows:
        # No rank can be quicker than the schedule allows, with sleeps as they were.
        assert all(0 < r <= b < 1 for r, b in zip(row["replayed"], row["bubble"], strict=True))
        assert len(row["wall"]) == 2
