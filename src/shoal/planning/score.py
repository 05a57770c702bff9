"""How good predictions of published steps are, per table: errors, what they are worth against a constant utilisation,
ranking, and what choosing by them costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from shoal.planning.fit import table_weights
from shoal.planning.published import Published
from shoal.planning.work import Array, Flags, Names, Work

# Rows of a table that counts in the mean of tables; of one that tells a model from a constant, whose error is at least
# this many percent.
COUNTS, DISCRIMINATES, HARD = 10, 20, 15.0
# Layouts that a choice is among.
_CHOICES = 3
# An 80 % interval, in standard deviations of a distribution with heavy tails.
_WIDTH = 1.45
# Standard deviations of a logarithm: of a row; of a table; more for a device, or a stack, of which no row was fitted.
# After three rows of the target: of a row, and of the rest.
ROW, TABLE, DEVICE, STACK, CALIBRATED = 0.06, 0.12, 0.08, 0.10, 0.04
EXPERTS = 0.10
"""More where a model has experts: no row of any has been fitted."""


def interval(spread: Array) -> tuple[Array, Array]:
    """Factors of a prediction between which four in five measurements lie. spread: of its logarithm."""
    return np.exp(-_WIDTH * spread), np.exp(_WIDTH * spread)


def spread(rows: Published, fitted_devices: Iterable[str], calibrated: bool) -> Array:
    """Standard deviation of the logarithm of measured over predicted, (n,)."""
    if calibrated:
        return np.full(len(rows.work), np.hypot(ROW, CALIBRATED))
    fitted = set(fitted_devices)
    unseen = np.array([name.partition("-")[0] not in fitted for name in rows.work.device], dtype=bool)
    routed = rows.work.experts > 0
    return np.sqrt(ROW**2 + TABLE**2 + DEVICE**2 * unseen + STACK**2 * ~rows.known + EXPERTS**2 * routed)


def constant(work: Work, fitted: Work, seconds: Array, table: Names) -> Array:
    """Seconds at the one utilisation of the peak, by model FLOPs, with which the fitted rows' error is least."""
    at_peak = _at_peak(fitted)
    ratios = seconds / at_peak
    weights = table_weights(table)

    def error(factor: float) -> float:
        return float((weights * np.abs(at_peak * factor - seconds) / seconds).sum())

    return _at_peak(work) * min(np.quantile(ratios, np.linspace(0.02, 0.98, 97)), key=error)


def _at_peak(work: Work) -> Array:
    return work.model_flops / (work.devices * work.peak * (1 + work.low))


def percent(predicted: Array, seconds: Array) -> Array:
    """Signed errors."""
    return 100 * (predicted / seconds - 1)


def table_scores(rows: Published, which: Flags, predicted: Array, baseline: Array, wide: Array) -> dict[str, Any]:
    """Of the rows `which` of one table; NaN where a figure has no meaning. predicted, baseline: seconds, the model's
    and a constant utilisation's. wide: spread of a prediction's logarithm."""
    work, seconds = rows.work.take(which), rows.seconds[which]
    found, plain = predicted[which], baseline[which]
    errors, of_constant = percent(found, seconds), float(np.abs(percent(plain, seconds)).mean())
    mape = float(np.abs(errors).mean())
    rate = work.global_batch * work.sequence / work.devices
    low, high = interval(wide[which])
    regrets, simple = regret(work, rows.same_group(which), seconds, found)
    best, best_constant = best_scalar(found, seconds), best_scalar(plain, seconds)
    return {
        "rows": len(seconds), "mape": mape, "median": float(np.median(np.abs(errors))),
        "p90": float(np.quantile(np.abs(errors), 0.9)), "bias": float(errors.mean()), "constant_mape": of_constant,
        "zero_shot_skill": 1 - mape / of_constant, "shape_skill": 1 - best / best_constant if best_constant else np.nan,
        "spearman": spearman(rate / found, rate / seconds),
        "regret_mean": float(np.mean(regrets)) if regrets else np.nan,
        "regret_max": max(regrets, default=np.nan), "regret_simple": float(np.mean(simple)) if simple else np.nan,
        "groups": len(regrets),
        "coverage80": float(((found * low <= seconds) & (seconds <= found * high)).mean()),
        "width80": float(np.mean(high / low)),
        "discriminates": bool(len(seconds) >= DISCRIMINATES and of_constant >= HARD),
    }  # fmt: skip


def best_scalar(predicted: Array, seconds: Array) -> float:
    """Mean absolute error in percent with the factor that makes it least: it is at one of the ratios."""
    ratios = np.quantile(seconds / predicted, np.linspace(0, 1, 201))
    return min(float(np.abs(percent(predicted * factor, seconds)).mean()) for factor in ratios)


def spearman(one: Array, other: Array) -> float:
    """Correlation of ranks, ties sharing theirs. NaN of fewer than three rows, or where all are equal."""
    if len(one) < 3:
        return float("nan")
    first, second = _ranks(one), _ranks(other)
    if first.std() == 0 or second.std() == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Array) -> Array:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray(last - (counts - 1) / 2, dtype=np.float64)[where]


def regret(
    work: Work, group: list[tuple[object, ...]], seconds: Array, predicted: Array
) -> tuple[list[float], list[float]]:
    """Percent by which the step of the layout that is predicted to be fastest is slower than the fastest one's, of each
    group with three layouts or more: by the prediction, and by the rule of the least tensor × pipeline. Of layouts
    predicted alike, the worst counts."""
    members: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for number, key in enumerate(group):
        members[key].append(number)
    found, simple = [], []
    for those in members.values():
        index = np.array(those)
        layouts = {tuple(float(getattr(work, name)[i]) for name in LAYOUT) for i in those}
        if len(layouts) < _CHOICES:
            continue
        best = seconds[index].min()
        chosen = predicted[index] <= predicted[index].min() * (1 + 1e-9)
        split = (work.tensor * work.pipeline)[index]
        found.append(float(100 * (seconds[index][chosen].max() / best - 1)))
        simple.append(float(100 * (seconds[index][split == split.min()].max() / best - 1)))
    return found, simple


# What a choice of layout is of.
LAYOUT = (
    "tensor",
    "pipeline",
    "chunks",
    "context",
    "data",
    "micro_batch",
    "recompute",
    "selective",
    "operators",
    "zero",
    "shards",
)
