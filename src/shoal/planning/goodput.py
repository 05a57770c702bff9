"""What a run gets done in its time: checkpoints, failures, ranks that wait for the slowest; days, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shoal.errors import JobError
from shoal.job.check import at_least, positive, require

DAY, HOUR = 86400.0, 3600.0
# Failures within one interval and restart beyond which nothing is worth predicting: a run gets on by 1 in e of that.
_MOST = 100.0


@dataclass(frozen=True)
class Goodput:
    """interval: seconds of training between two checkpoints. Shares of all time, which add up to 1: training that
    counts, checkpoints that it waits for, training that is lost and done again, restarts."""

    interval: float
    training: float
    checkpoints: float
    lost: float
    restarts: float


def interval(stall: float, mtbf: float) -> float:
    """Seconds of training between checkpoints that lose least, where each stops training for `stall` seconds and one
    of all devices fails every `mtbf` seconds: Daly 2006, "A higher order estimate of the optimum checkpoint interval
    for restart dumps"; its first term is Young's of 1974, √(2 · stall · mtbf)."""
    positive("stall", stall)
    positive("mtbf", mtbf)
    half = stall / (2 * mtbf)
    return math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(half) / 3 + half / 9) - stall if half < 1 else mtbf


def goodput(stall: float, restart: float, mtbf: float | None, every: float | None = None) -> Goodput:
    """Expected, where failures are independent of all before (exponential).

    stall: seconds that a checkpoint stops training for; it is whole after them. (One that is written behind training
    loses more, by the seconds of writing, at a failure.) restart: seconds from a failure to the step after the
    checkpoint; it may fail, too. mtbf: seconds between failures of any device of the run (`Cluster.mtbf`); None: there
    are none. every: seconds of training between checkpoints; None: the best.

    An interval with its checkpoint takes w = every + stall, and mtbf · exp(restart / mtbf) · (exp(w / mtbf) − 1) with
    all that fails of it (Daly 2006).
    """
    at_least("stall", stall, 0)
    at_least("restart", restart, 0)
    if every is not None:
        positive("every", every)
    if mtbf is None:
        chosen = math.inf if every is None else every
        waits = stall / (stall + chosen)
        return Goodput(chosen, 1 - waits, waits, 0.0, 0.0)
    chosen = interval(stall, mtbf) if every is None else every
    whole = chosen + stall
    if (whole + restart) / mtbf > _MOST:
        what = f"a failure every {mtbf:.3g} s, with {whole:.3g} s to a checkpoint and {restart:.3g} s to a restart"
        raise JobError(f"no run would get on: {what}", fix="save more often, restart faster, or take fewer devices")
    failures = math.expm1(whole / mtbf)
    again = failures * mtbf * math.expm1(restart / mtbf)
    seconds = failures * mtbf + again
    return Goodput(chosen, chosen / seconds, stall / seconds, (failures * mtbf - whole) / seconds, again / seconds)


def slowest(ranks: Sequence[tuple[float, int]]) -> float:
    """Seconds that a step takes longer than its mean, where all ranks wait for the slowest: the expected largest of
    independent normals of mean 0. ranks: standard deviation in seconds, and how many have it."""
    for deviation, count in ranks:
        at_least("deviation", deviation, 0)
        at_least("count", count, 1)
    require(bool(ranks), "there are no ranks", "give the deviation of some")
    scale = max(deviation for deviation, _ in ranks)
    if scale == 0:
        return 0.0
    # E[max] = ∫ (1 − F) over what is positive − ∫ F over what is negative, with F the product of all distributions.
    x = np.linspace(-9.0, 9.0, 7201)
    log_all = np.zeros(len(x))
    for deviation, count in ranks:
        log_all += count * _log_below(x * scale / deviation) if deviation else np.where(x < 0, -np.inf, 0.0)
    above, step = -np.expm1(log_all), float(x[1] - x[0])
    inside = np.where(x > 0, above, np.where(x < 0, above - 1, 0.0))
    # At 0 it jumps: each side has half of a step.
    zero = float(above[len(x) // 2])
    return scale * step * float(inside.sum() + (2 * zero - 1) / 2)


def _log_below(x: np.ndarray) -> np.ndarray:
    """Logarithm of the chance that a standard normal is less."""
    above = np.array([0.5 * math.erfc(one / math.sqrt(2)) for one in np.clip(x, -35.0, 35.0)])
    below = np.array([0.5 * math.erfc(-one / math.sqrt(2)) for one in np.clip(x, -35.0, 35.0)])
    return np.asarray(np.where(x > 0, np.log1p(-np.where(x > 0, above, 0.0)), np.log(below)))


def days(tokens: float, tokens_per_second: float, training: float = 1.0) -> float:
    """Until so many tokens are trained on. tokens_per_second: of all devices, while they train. training: the share of
    the time in which they do."""
    for name, value in (("tokens", tokens), ("tokens_per_second", tokens_per_second), ("training", training)):
        positive(name, value)
    require(training <= 1, f"training={training} is more than all of the time", "give a share of 1 or less")
    return tokens / tokens_per_second / training / DAY


def cost(price: float | None, days: float) -> float | None:
    """Of so many days. price: of all devices for an hour (`Cluster.price`); None where it is not told."""
    return None if price is None else price * days * DAY / HOUR
