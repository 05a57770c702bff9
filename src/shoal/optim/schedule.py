"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from shoal.job.optim import OptimOptions


def learning_rate(options: OptimOptions, step: int, steps: int) -> float:
    """Learning rate of update `step` (0 is the first) in a run of `steps`.

    cosine: Loshchilov and Hutter 2017 (SGDR) without restarts. wsd: warm-up, stable, linear decay
    (Hu et al. 2024, MiniCPM; linear as in Hägele et al. 2024).
    """
    warmup = max(1, round(options.warmup * steps)) if options.warmup else 0
    if step < warmup:
        return options.lr * (step + 1) / warmup
    low = options.final_lr
    if options.schedule == "cosine":
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return options.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))
    if options.schedule == "wsd":
        decay = max(1, round(options.decay * steps))
        left = min(1.0, max(0, steps - 1 - step) / decay)
        return options.lr * (low + (1 - low) * left)
    return options.lr
