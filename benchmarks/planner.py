"""Scores the planner's predictions on published measurements, table by table.

    python benchmarks/planner.py CSV [--calibrate auto|CSV] [--rows FILE] [--leave-one-out] [--format json]

CSV: any file with the columns of src/shoal/planning/published_fit.csv, on which alone the constants were fitted. A
row with too little in it is skipped, by reason. Rows of a configuration that was fitted are of class `rerun` and count
in no mean, unless the file is the fitted one itself: then all rows are of class `fitted`.
mape, median, p90, bias: of step time, in percent. constant_mape: of the one utilisation of the peak that fits the
fitted rows best. zero_shot_skill = 1 - mape / constant_mape; shape_skill: the same with both given their best factor.
memory: of all rows that tell of a device's memory: median error in percent; false_fits: rows that ran out of it though
1.1 times what is predicted is no more than there is, or that had in use more than 1.1 times what is predicted.
regret: by how many percent the layout that is predicted fastest is slower than the one that was. overall: mean of
tables with ten rows or more.
--calibrate auto: of each table three rows, the quartiles by step time, are used to calibrate and are not scored; a CSV:
the rows of it with the table's name. --rows: a CSV of every row with its prediction. --leave-one-out: each table of the
fitted file is predicted by constants of the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import ShoalError
from shoal.planning import constants, fit, memory, published, score, step
from shoal.planning.published import Filled, Published

RERUN, FITTED, EXPERTS = "rerun", "fitted", "moe"


def class_of(rows: Published, which: np.ndarray, fitted_devices: set[str]) -> str:
    """What kind of table it is, by most of its rows."""
    work = rows.work.take(which)
    if (work.experts > 0).all():
        return EXPERTS
    if np.mean([name.partition("-")[0] not in fitted_devices for name in work.device]) > 0.5:
        return "unseen device"
    if work.low.mean() > 0.5:
        return "fp8"
    if (work.zero == 3).mean() > 0.5:
        return "fsdp"
    return "multi-node" if (work.devices > work.per_node).mean() > 0.5 else "single-node"


def of_memory(rows: Filled) -> dict[str, Any]:
    """rows: that have a figure to compare, so that a median of none is NaN."""
    work, known = memory.cost(rows.work), np.isfinite(rows.measured)
    totals = {kind: work.total(kind) / 2**30 for kind in memory.KINDS}
    # What ran out of memory ran out of all of the device's.
    predicted = np.where(rows.out, totals["device"], np.select([rows.kind == kind for kind in totals], totals.values()))
    capacity = rows.work.memory / 2**30
    wrong = np.where(rows.out, predicted * 1.1 <= capacity, known & (predicted * 1.1 < rows.measured))
    errors = np.abs(score.percent(predicted[known], rows.measured[known]))
    return {
        "rows": int(known.sum()), "median": float(np.median(errors)) if known.any() else math.nan,
        "false_fits": int(wrong.sum()),
    }  # fmt: skip


def quartiles(seconds: np.ndarray) -> np.ndarray:
    """Which three rows calibrate."""
    order = np.argsort(seconds, kind="stable")
    return order[[round(part * (len(order) - 1)) for part in (0.25, 0.5, 0.75)]]


def scored(asked: argparse.Namespace) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    fitted, rows = published.read(published.FIT), published.read(asked.csv)
    known = constants.load()
    devices = {c.group for c in known.all if c.kind == constants.DEVICE}
    there = set(fitted.same)
    own = rows.same == fitted.same and bool(np.array_equal(rows.seconds, fitted.seconds))
    again = np.array([not own and same in there for same in rows.same], dtype=bool)
    baseline = score.constant(rows.work, fitted.work, fitted.seconds, fitted.table)
    targets = published.read(Path(asked.calibrate)) if asked.calibrate not in ("", "auto") else None
    tables, per_row = [], []
    for table in dict.fromkeys(rows.table):
        of_table = rows.table == table
        constants_ = known
        if asked.leave_one_out:
            kept = fitted.table != table
            constants_ = fit.fit(fitted.work.take(kept), fitted.seconds[kept], fitted.table[kept], known)
            baseline[of_table] = score.constant(
                rows.work.take(of_table), fitted.work.take(kept), fitted.seconds[kept], fitted.table[kept]
            )
        predicted, used, factor = np.full(len(rows.seconds), np.nan), np.zeros(len(rows.seconds), bool), 1.0
        if asked.calibrate == "auto" and of_table.sum() > 3:
            used[np.flatnonzero(of_table)[quartiles(rows.seconds[of_table])]] = True
            constants_, factor = fit.calibrate(rows.work.take(used), rows.seconds[used], constants_)
        elif targets is not None and (mine := targets.table == table).any():
            constants_, factor = fit.calibrate(targets.work.take(mine), targets.seconds[mine], constants_)
            there_too = {same for same, it in zip(targets.same, mine, strict=True) if it}
            used = np.array([same in there_too for same in rows.same], dtype=bool) & of_table
        predicted[of_table] = step.cost(rows.work.take(of_table), constants_).seconds * factor
        wide = score.spread(rows, devices, bool(asked.calibrate))
        left, routed = of_table & ~used, rows.work.experts > 0
        for which, kind in ((left & ~again & ~routed, ""), (left & ~again & routed, ""), (left & again, RERUN)):
            if not which.any():
                continue
            kind = kind or (FITTED if own and not asked.leave_one_out else class_of(rows, which, devices))
            found = score.table_scores(rows, which, predicted, baseline, wide)
            tables.append({"table": str(table), "class": kind, **found})
            low, high = score.interval(wide)
            per_row += [
                {
                    "table": table, "class": kind, "model": rows.rows[i].get("model", ""), "gpu": rows.rows[i]["gpu"],
                    "devices": int(rows.work.devices[i]), "tensor": int(rows.work.tensor[i]),
                    "pipeline": int(rows.work.pipeline[i]), "micro_batch": rows.work.micro_batch[i],
                    "global_batch": int(rows.work.global_batch[i]), "seconds": rows.seconds[i],
                    "predicted": predicted[i], "low80": predicted[i] * low[i], "high80": predicted[i] * high[i],
                    "error_percent": 100 * (predicted[i] / rows.seconds[i] - 1),
                }
                for i in np.flatnonzero(which)
            ]  # fmt: skip
    counted = [t for t in tables if t["class"] != RERUN and t["rows"] >= score.COUNTS]
    overall = {"tables": len(counted), "rows": sum(t["rows"] for t in counted)}
    for name in ("mape", "median", "shape_skill", "coverage80"):
        overall[name] = float(np.nanmean([t[name] for t in counted])) if counted else math.nan
    return {
        "overall": overall,
        "tables": tables,
        "memory": of_memory(rows.filled),
        "skipped": dict(rows.skipped),
    }, per_row


def without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def shown(found: dict[str, Any]) -> str:
    names = ("rows", "mape", "median", "p90", "bias", "constant_mape", "zero_shot_skill", "shape_skill", "spearman",
             "regret_mean", "regret_max", "coverage80")  # fmt: skip
    lines = [f"{'table':<20} {'class':<14} " + " ".join(f"{name.replace('_', ' ')[:9]:>9}" for name in names)]
    for row in found["tables"]:
        cells = ("-" if math.isnan(row[n]) else f"{row[n]:.0f}" if n == "rows" else f"{row[n]:.2f}" for n in names)
        lines.append(f"{row['table']:<20} {row['class']:<14} " + " ".join(f"{cell:>9}" for cell in cells))
    overall = found["overall"]
    lines.append(
        f"mean of {overall['tables']} tables with {score.COUNTS} rows or more ({overall['rows']} rows): "
        f"{overall['mape']:.1f} %, median {overall['median']:.1f} %, coverage {overall['coverage80']:.2f}"
    )
    of_all = found["memory"]
    if of_all["rows"] or of_all["false_fits"]:
        error = "" if math.isnan(of_all["median"]) else f"median error {of_all['median']:.1f} %, "
        lines.append(f"memory: {of_all['rows']} rows, {error}{of_all['false_fits']} false fits")
    lines += [f"skipped: {count}: {reason}" for reason, count in found["skipped"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--calibrate", default="", metavar="auto|CSV")
    parser.add_argument("--rows", type=Path, help="a CSV of every row with its prediction")
    parser.add_argument("--leave-one-out", action="store_true")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    asked = parser.parse_args()
    try:
        found, rows = scored(asked)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    if not rows:
        skipped = ", ".join(f"{count} with {reason}" for reason, count in found["skipped"].items()) or "there is none"
        print(f"error: {asked.csv}: no row can be scored: {skipped}", file=sys.stderr)
        raise SystemExit(2)
    if asked.rows:
        with asked.rows.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            # Five digits, as no measurement has more.
            exact = [{k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
            writer.writerows(exact)
    print(json.dumps(without_nan(found)) if asked.format == "json" else shown(found))


if __name__ == "__main__":
    main()
