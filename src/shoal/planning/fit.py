"""Fits the cost model's constants to measured steps: on what is published, or a little, on three rows of a target.

Residuals are of logarithms, with a Cauchy loss (Holland & Welsch 1977): some published rows are of allocators in
trouble, or a slip of the pen, and no constant should explain them. Tables count by the power 0.35 of their rows, so
that a large one is not all there is. Priors hold what no row determines.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shoal.planning import step
from shoal.planning.constants import SHARED, Constants
from shoal.planning.work import Array, Names, Work

# Of the loss: residual at which a row begins to count less. Of the priors, against the rows. Rows' weight by table.
_CAUCHY, _PRIOR, _BY_TABLE = 0.08, 0.05, 0.65
# Of three rows of a target: how far a common factor may be off; noise of a row; how far constants may move, of their
# prior's width, shared ones less.
_FACTOR, _NOISE, _OF_SHARED, _OF_OTHERS = 0.08, 0.06, 0.3, 0.6
_DIFFERENCE = 1e-3


def table_weights(table: Names) -> Array:
    """Of each row; their mean is 1."""
    _, where, counts = np.unique(table, return_inverse=True, return_counts=True)
    weights = counts[where].astype(np.float64) ** -_BY_TABLE
    return np.asarray(weights / weights.mean(), dtype=np.float64)


def fit(work: Work, seconds: Array, table: Names, start: Constants, sweeps: int = 25) -> Constants:
    """Levenberg-Marquardt on the reweighted residuals. start: whose priors hold, and whose values it begins with."""
    logs, priors, spreads = start.logs, start.priors, start.spreads
    weights, measured = table_weights(table), np.log(seconds)
    damping = 1e-2
    now = _predicted(work, start, logs)
    for _ in range(sweeps):
        residual = now - measured
        slopes = _slopes(work, start, logs, now)
        robust = weights / (1 + (residual / _CAUCHY) ** 2)
        curvature = slopes.T @ (robust[:, None] * slopes) + np.diag(_PRIOR / spreads**2)
        downhill = slopes.T @ (robust * residual) + _PRIOR * (logs - priors) / spreads**2
        before = _loss(residual, weights, logs, priors, spreads)
        after = before
        for _ in range(8):
            move = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), downhill)
            trial = logs - np.clip(move, -1, 1)
            then = _predicted(work, start, trial)
            after = _loss(then - measured, weights, trial, priors, spreads)
            if after < before:
                logs, now, damping = trial, then, max(damping / 4, 1e-6)
                break
            damping *= 4
        if not after < before * (1 - 1e-6):
            break
    return start.at(logs)


def calibrate(work: Work, seconds: Array, prior: Constants) -> tuple[Constants, float]:
    """(constants, a factor of all predictions) after a few rows of a target; both stay near where they were.

    So few rows determine little: all constants move together as far as the priors allow (maximum a posteriori).
    """
    count = len(prior.all)
    width = np.array([c.spread * (_OF_SHARED if c.kind == SHARED else _OF_OTHERS) for c in prior.all] + [_FACTOR])
    moved, measured, start = np.zeros(count + 1), np.log(seconds), prior.logs
    for _ in range(5):
        now = _predicted(work, prior, start + moved[:count])
        slopes = np.column_stack([_slopes(work, prior, start + moved[:count], now), np.ones(len(work))])
        curvature = slopes.T @ slopes / _NOISE**2 + np.diag(1 / width**2)
        downhill = slopes.T @ (now + moved[count] - measured) / _NOISE**2 + moved / width**2
        moved = moved - np.clip(np.linalg.solve(curvature, downhill), -0.5, 0.5)
    return prior.at(start + moved[:count]), float(np.exp(moved[count]))


def felt(work: Work, constants: Constants, by: float = 0.002) -> npt.NDArray[np.int64]:
    """For each constant, the rows whose prediction changes by more than `by` where it changes by a tenth."""
    slopes = _slopes(work, constants, constants.logs, _predicted(work, constants, constants.logs))
    return (np.abs(slopes) * 0.1 > by).sum(axis=0)


def _predicted(work: Work, constants: Constants, logs: Array) -> Array:
    return np.log(step.cost(work, constants.at(logs)).seconds)


def _slopes(work: Work, constants: Constants, logs: Array, now: Array) -> Array:
    columns = []
    for number in range(len(logs)):
        moved = logs.copy()
        moved[number] += _DIFFERENCE
        columns.append((_predicted(work, constants, moved) - now) / _DIFFERENCE)
    return np.column_stack(columns)


def _loss(residual: Array, weights: Array, logs: Array, priors: Array, spreads: Array) -> float:
    of_rows = (weights * _CAUCHY**2 * np.log1p((residual / _CAUCHY) ** 2)).sum()
    return float(of_rows + _PRIOR * (((logs - priors) / spreads) ** 2).sum())
