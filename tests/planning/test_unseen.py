"""Published rows that no constant was fitted on: predictions stay as good as docs/planner-validation.md says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shoal.planning import constants, memory, published, step

FILE = Path(__file__).parents[2] / "benchmarks" / "unseen.csv"


@pytest.fixture(scope="module")
def rows() -> published.Published:
    return published.read(FILE)


def test_every_row_can_be_used_and_none_was_fitted(rows: published.Published):
    assert not rows.skipped
    assert len(rows.seconds) == 356
    assert not set(rows.table) & set(published.read(published.FIT).table)


@pytest.mark.parametrize(
    ("table", "most"),
    [
        ("foundry-h100", 6.5), ("foundry-a100-80", 14.5), ("foundry-a100-40", 10.5), ("torchtitan-a100", 3.5),
        ("torchtitan-h100", 17), ("torchtitan-h200", 6), ("fms-fsdp-a100", 11), ("bridge-gb200", 8),
        ("bridge-gb300", 5), ("bridge-b200", 6), ("maxtext-v5p", 22), ("maxtext-v4", 16), ("bridge-moe-gb300", 9),
    ],
)  # fmt: skip
def test_step_times(rows: published.Published, table: str, most: float):
    """Mean error in percent."""
    which = rows.table == table
    predicted = step.cost(rows.work.take(which), constants.load()).seconds
    assert np.abs(100 * (predicted / rows.seconds[which] - 1)).mean() < most


def test_memory(rows: published.Published):
    """Of torchtitan's table of December 2024: what its allocator has reserved."""
    filled = rows.filled
    which = np.array([row["table"] == "torchtitan-h100" for row in filled.rows])
    found = memory.cost(filled.work.take(which)).total("reserved") / 2**30
    errors = 100 * (found / filled.measured[which] - 1)
    assert which.sum() == 18
    assert np.median(np.abs(errors)) < 6
    assert np.abs(errors).max() < 18
