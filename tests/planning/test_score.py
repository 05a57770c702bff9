"""What is said of predictions: figures with known answers, and a table that the model itself has made."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shoal.planning import constants, memory, published, score, step
from tests.planning.test_published import ROW, file

ROOT = Path(__file__).parents[2]


def planner(*words: object) -> dict:
    ended = subprocess.run(
        [sys.executable, "benchmarks/planner.py", *map(str, words), "--format", "json"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True, env={"PYTHONPATH": "src:."},
    )  # fmt: skip
    return json.loads(ended.stdout)


def test_spearman():
    one = np.array([1.0, 2.0, 3.0, 4.0])
    assert score.spearman(one, 10 * one) == pytest.approx(1)
    assert score.spearman(one, -one) == pytest.approx(-1)
    # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
    assert score.spearman(np.array([1.0, 2.0, 2.0, 3.0]), one) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert np.isnan(score.spearman(one[:2], one[:2]))


def test_the_best_factor():
    seconds = np.array([1.0, 2.0, 4.0])
    assert score.best_scalar(3 * seconds, seconds) == pytest.approx(0)
    # Of ratios 1, 1 and 2 a factor of 1 leaves one row half as long as it is: a sixth in the mean.
    assert score.best_scalar(seconds / [1, 1, 2], seconds) == pytest.approx(100 / 6)


def layouts(tmp_path, seconds, **row):
    """Three layouts of one model on 16 devices."""
    splits = [{"tp": "2", "pp": "2"}, {"tp": "4", "pp": "2"}, {"tp": "8", "pp": "1"}]
    rows = [{**split, "iteration_s": str(s), **row} for split, s in zip(splits, seconds, strict=True)]
    return published.read(file(tmp_path, *rows))


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [([5, 6, 7], 100 * (4 / 3 - 1)), ([7, 6, 5], 100 * (5 / 3 - 1)), ([6, 5, 7], 0), ([5, 5, 7], 100 * (4 / 3 - 1))],
)
def test_regret(tmp_path, predicted, expected):
    """Of layouts that are predicted alike the worst counts; the simple rule takes the least tensor × pipeline."""
    rows = layouts(tmp_path, [4, 3, 5])
    which = np.ones(3, dtype=bool)
    found, simple = score.regret(rows.work, rows.same_group(which), rows.seconds, np.array(predicted, dtype=float))
    assert found == pytest.approx([expected])
    assert simple == pytest.approx([100 * (4 / 3 - 1)])


def test_two_layouts_are_no_choice(tmp_path):
    rows = layouts(tmp_path, [4, 3, 5])
    which = np.array([True, True, False])
    assert score.regret(rows.work.take(which), rows.same_group(which), rows.seconds[which], rows.seconds[which]) == (
        [],
        [],
    )


def test_a_table_that_the_model_made_has_no_error(tmp_path):
    splits = [(t, p, m) for t in (1, 2, 4, 8) for p in (1, 2) for m in (1, 2)]
    rows = [{"tp": str(t), "pp": str(p), "micro_batch": str(m)} for t, p, m in splits]
    read = published.read(file(tmp_path, *rows))
    seconds = step.cost(read.work, constants.load()).seconds
    path = file(
        tmp_path,
        *({**row, "iteration_s": repr(float(s))} for row, s in zip(rows, seconds, strict=True)),
        {"layers": ""},
    )
    found = planner(path)
    (table,) = found["tables"]
    assert (table["table"], table["class"], table["rows"]) == ("t", "multi-node", 16)
    for name in ("mape", "median", "p90", "bias", "regret_mean", "regret_max"):
        assert abs(table[name]) < 1e-6, name
    assert table["spearman"] == pytest.approx(1)
    assert table["zero_shot_skill"] == pytest.approx(1)
    assert table["coverage80"] == 1
    assert table["constant_mape"] > 5
    assert found["skipped"] == {"no layers": 1}
    assert found["overall"]["mape"] == table["mape"]
    assert found["overall"].keys() == {"tables", "rows", "mape", "median", "shape_skill", "coverage80"}
    # A fifth slower, it is a fifth off, and three rows of it say so.
    slower = file(
        tmp_path, *({**row, "iteration_s": repr(1.2 * float(s))} for row, s in zip(rows, seconds, strict=True))
    )
    assert planner(slower)["tables"][0]["mape"] == pytest.approx(100 / 6)
    told = planner(slower, "--calibrate", "auto")["tables"][0]
    assert told["rows"] == 13
    assert told["mape"] < 8


def test_memory_is_scored(tmp_path):
    """Two rows with what the model says, one with a quarter more; and two that ran out of memory, an 8B model on one
    device of 80 GB, which is no surprise, and a small one."""
    one = {"mem_kind": "device (nvidia-smi)", "peak_mem_gib": "1"}
    filled = published.read(file(tmp_path, one)).filled
    known = float(memory.cost(filled.work).total("device")[0]) / 2**30
    lone = {"num_gpus": "1", "tp": "1", "pp": "1", "iteration_s": ""}
    path = file(
        tmp_path,
        {**one, "peak_mem_gib": repr(known)}, {**one, "peak_mem_gib": repr(known), "iteration_s": ""},
        {**one, "peak_mem_gib": repr(1.25 * known)},
        {**lone, "peak_mem_gib": "OOM"}, {**lone, "layers": "2", "vocab": "1000", "mem_kind": "out of memory"},
    )  # fmt: skip
    found = planner(path)
    assert found["memory"] == {"rows": 3, "median": pytest.approx(0, abs=1e-6), "false_fits": 2}
    assert found["skipped"] == {"out of memory: no time": 2, "no seconds, and no tokens/s": 1}
    assert found["tables"][0]["rows"] == 2


def test_what_was_fitted_is_told_apart(tmp_path):
    """A configuration of the fitted file is no test of the fit."""
    with published.FIT.open(newline="") as there:
        known = next(row for row in csv.DictReader(there) if row["table"] == "dgxc")
    path = file(tmp_path, {name: known[name] for name in ROW}, *({"micro_batch": "2"} for _ in range(3)))
    classes = {table["class"]: table["rows"] for table in planner(path)["tables"]}
    assert classes == {"rerun": 1, "multi-node": 3}


def test_the_fitted_file_says_that_it_is():
    found = planner(published.FIT)
    assert {table["class"] for table in found["tables"]} == {"fitted"}
    assert found["overall"]["mape"] < 6
    assert sum(found["skipped"].values()) == 45
    assert found["memory"]["rows"] == 70
    assert found["memory"]["median"] < 5


@pytest.mark.nightly
def test_left_out_tables_are_predicted_within_a_sixth():
    """Of the published rows; the figures are in docs/planner-validation.md."""
    found = planner(published.FIT, "--leave-one-out")
    assert found["overall"]["tables"] == 7
    assert found["overall"]["rows"] == 898
    assert found["overall"]["mape"] < 12
    assert 0.7 <= found["overall"]["coverage80"] <= 0.95
    assert all(table["mape"] < 17 for table in found["tables"])


def test_mistakes_are_said(tmp_path):
    ended = subprocess.run(
        [sys.executable, "benchmarks/planner.py", tmp_path / "nothing.csv"],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env={"PYTHONPATH": "src:."},
    )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert "Traceback" not in ended.stderr
