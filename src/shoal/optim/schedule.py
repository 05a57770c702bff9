"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import replace

from shoal.job.optim import OptimOptions


def learning_rate(options: OptimOptions, step: int, steps: int) -> float:
    """Learning rate of update `step` (0 is the first) in a run of `steps`.

    cosine: Loshchilov and Hutter 2017 (SGDR) without restarts. wsd: warm-up, stable, linear decay
    (Hu et al. 2024, MiniCPM; linear as in Hägele et al. 2024).
    """
    warmup = _warmup(options, steps)
    if step < warmup:
        return options.lr * (step + 1) / warmup
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

    cosine: the end of the warm-up. wsd: the end of the stable phase. constant has none: four fifths of the run.
    """
    warmup = _warmup(options, steps)
    if options.schedule == "cosine":
        return min(steps, warmup + 1)
    if options.schedule == "wsd":
        return max(warmup, steps - _decay(options, steps))
    return max(warmup, round(0.8 * steps))


def of_length(options: OptimOptions, old: int, new: int) -> OptimOptions:
    """The schedule of `new` steps whose rates are those of `old` ones until `open_until(options, old)`.

    new: more than that. For wsd, all steps that are left are its decay.
    """
    start = open_until(options, old)
    assert new > start
    changed = replace(options, warmup=_warmup(options, old) / new)
    return replace(changed, decay=(new - start) / new) if options.schedule == "wsd" else changed


def _warmup(options: OptimOptions, steps: int) -> int:
    return max(1, round(options.warmup * steps)) if options.warmup else 0


def _decay(options: OptimOptions, steps: int) -> int:
    return max(1, round(options.decay * steps))
