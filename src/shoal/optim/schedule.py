"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import replace

from shoal.job.optim import OptimOptions


def learning_rate(options: OptimOptions, step: float, steps: int) -> float:
    """Learning rate of update `step` (0 is the first; may lie between two) in a run of `steps`.

    cosine: Loshchilov and Hutter 2017 (SGDR) without restarts. wsd: warm-up, stable, linear decay
    (Hu et al. 2024, MiniCPM; linear as in Hägele et al. 2024).
    """
    warmup = warmup_steps(options, steps)
    if step < warmup:
        # Between the last step of warm-up and the next one it would go on rising.
        return options.lr * min(1.0, (step + 1) / warmup)
    low = options.final_lr
    if options.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return options.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
    if options.schedule == "wsd":
        decay = _decay(options, steps)
        left = min(1.0, max(0, steps - 1 - step) / decay)
        return options.lr * (low + (1 - low) * left)
    return options.lr


def open_until(options: OptimOptions, steps: int) -> int:
    """The first step whose rate depends on how long the run is: till then it may still become longer or shorter.

    cosine: the end of the warm-up. wsd: the end of the stable phase. constant: the end of the run.
    """
    warmup = warmup_steps(options, steps)
    if options.schedule == "cosine":
        return min(steps, warmup + 1)
    if options.schedule == "wsd":
        return max(warmup, steps - _decay(options, steps))
    return steps


def of_length(options: OptimOptions, old: int, new: int, step: int) -> OptimOptions:
    """The schedule of `new` steps whose rates are those of `old` ones until `step`, for which the length was open.

    new: not less than the steps of warm-up, where that is a share. wsd: its decay keeps its share of the steps, unless
    it would have begun already: then it is all that is left.
    """
    assert step <= open_until(options, old)
    assert step < new >= least_steps(options, old)
    changed = options if options.warmup > 1 else replace(options, warmup=warmup_steps(options, old) / new)
    if options.schedule == "wsd" and step > open_until(changed, new):
        changed = replace(changed, decay=(new - step) / new)
    return changed


def warmup_steps(options: OptimOptions, steps: int) -> int:
    """Steps with rising rate, of a run of `steps`; where they are given as steps, of any."""
    if options.warmup > 1:
        return int(options.warmup)
    return max(1, round(options.warmup * steps)) if options.warmup else 0


def least_steps(options: OptimOptions, steps: int) -> int:
    """To which a run of `steps` may become shorter with the same warm-up: a share of it is at most all of it."""
    return 0 if options.warmup > 1 else warmup_steps(options, steps)


def _decay(options: OptimOptions, steps: int) -> int:
    return max(1, round(options.decay * steps))
