"""The benchmarks can be started, and what scripts read of them has the names that are promised."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from benchmarks import step

FILES = sorted(path.stem for path in Path(step.__file__).parent.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("name", FILES)
def test_it_can_be_imported(name: str) -> None:
    assert importlib.import_module(f"benchmarks.{name}").__doc__


def test_a_row_has_the_promised_names(monkeypatch) -> None:
    seconds = {name: [1.0, 2.0, 1.5] for name in ("shoal", "ddp", "hf", "shoal again")}
    found = {"seconds_per_token": seconds, "peak": 1e12}
    monkeypatch.setattr("shoal.launch.local.run", lambda *_, **__: found)
    row = step.measure("bf16", 3)
    promised = {"precision", "vocab", "shoal", "ddp", "hf", "ratio_ddp", "ratio_hf", "ratio_ddp_low", "ratio_hf_low"}
    assert promised | {"aa"} <= set(row)
    assert row["ratio_ddp"] == row["aa"] == pytest.approx(1)
    assert "MFU" in step.table([row])
