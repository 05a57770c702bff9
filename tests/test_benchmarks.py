"""The benchmarks can be started, and what scripts read of them has the names that are promised."""

from __future__ import annotations

import importlib
import time
from pathlib import Path

import pytest
from benchmarks import step, turns

from shoal.errors import RankError

FILES = sorted(path.stem for path in Path(step.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", FILES)
def test_it_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__


def test_a_row_has_the_promised_names(monkeypatch) -> None:
    seconds = {name: [1.0, 2.0, 1.5] for name in ("shoal", "ddp", "hf", "shoal again")}
    found = {name: {"tokens": 512.0, "peak": 1e12, "memory": 2**30} for name in seconds}
    monkeypatch.setattr(step, "over_starts", lambda *_: (seconds, found))
    row = step.measure("bf16", 3)
    promised = {"precision", "vocab", "shoal", "ddp", "hf", "ratio_ddp", "ratio_hf", "ratio_ddp_low", "ratio_hf_low"}
    assert promised | {"aa"} <= set(row)
    assert row["ratio_ddp"] == row["aa"] == pytest.approx(1)
    assert "MFU" in step.table([row])


@pytest.mark.nightly
def test_contenders_take_turns() -> None:
    contenders = {name: {"contender": name} for name in ("a", "b c")}
    seconds, found = turns.in_turns("tests.cases:take_turns", contenders, 3)
    assert seconds == {"a": [1.0, 2.0, 3.0], "b c": [1.0, 2.0, 3.0]}
    assert found == {"a": "a", "b c": "b c"}


@pytest.mark.nightly
def test_a_contender_that_fails_ends_the_benchmark() -> None:
    """Also where another one waits for its turn: nobody waits for that one."""
    contenders = {"waits": {"contender": "waits"}, "fails": {"contender": "fails", "fails": True}}
    start = time.monotonic()
    with pytest.raises(RankError, match="rank 1: ended with exit code 3"):
        turns.in_turns("tests.cases:take_turns", contenders, 3)
    assert time.monotonic() - start < 60
