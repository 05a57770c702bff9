"""Replicas that average in pairs, in one process with nothing of shoal's but the model and who meets whom."""

from __future__ import annotations

from typing import Any

import torch

from shoal.sync.pairs import partner
from tests.equivalence import cases
from tests.models import experts
from tests.sync import local_cases


def reference(
    replicas: int, steps: int, every: int, outer_lr: float, momentum: float, pull: float, **options: Any
) -> dict[str, Any]:
    """Every replica's weights after every step, and its losses, in float64."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _reference(replicas, steps, every, outer_lr, momentum, pull, **options)
    finally:
        torch.set_num_threads(threads)


def _reference(
    replicas: int, steps: int, every: int, outer_lr: float, momentum: float, pull: float, **options: Any
) -> dict[str, Any]:
    what = cases.job("replicas=1", steps, **options)
    models = [local_cases._model(what) for _ in range(replicas)]
    inner = [local_cases._optimizer(what, model) for model in models]
    fast = [{name: t.detach() for name, t in experts.canonical(model)} for model in models]
    slow = [{name: t.clone() for name, t in of_one.items()} for of_one in fast]
    speed = [{name: torch.zeros_like(t) for name, t in of_one.items()} for of_one in fast]
    losses: list[list[float]] = [[] for _ in range(replicas)]
    history = []
    for step in range(steps):
        for r, batch in enumerate(local_cases._data(step, replicas)):
            tokens = batch.weight_BL.double().sum()
            models[r].zero_grad()
            loss = cases._loss(what, models[r], batch, step)
            loss.backward()
            losses[r].append((loss / tokens).item())
            for p in models[r].parameters():
                p.grad = (torch.zeros_like(p) if p.grad is None else p.grad) / tokens
            local_cases._update(what, models[r], inner[r], step, steps)
        if step + 1 == steps:
            for name in fast[0]:
                mean = sum(one[name] for one in fast) / replicas
                for one in fast:
                    one[name].copy_(mean)
        elif (step + 1) % every == 0:
            met = [partner(5, (step + 1) // every - 1, replicas, r) for r in range(replicas)]
            groups = [[r] if p is None else [r, p] for r, p in enumerate(met)]
            new = []
            for r, group in enumerate(groups):
                of_one = {}
                for name in slow[r]:
                    gained = sum(fast[g][name] - slow[g][name] for g in group) / len(group)
                    mean = sum(slow[g][name] for g in group) / len(group)
                    speed[r][name] = momentum * speed[r][name] + outer_lr * gained - pull * (slow[r][name] - mean)
                    of_one[name] = slow[r][name] + speed[r][name]
                new.append(of_one)
            slow = new
            for r in range(replicas):
                for name in fast[r]:
                    fast[r][name].copy_(slow[r][name])
        history.append([{name: t.clone() for name, t in one.items()} for one in fast])
    return {"losses": losses, "own": history}
