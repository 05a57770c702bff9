"""What is done about gradients that are τ commits old when they are applied: one of `job.server.COMPENSATIONS`.

rate, age: the coordinator, by numbers alone. dc, look-ahead, delayed-nesterov: the shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shoal.errors import JobError
from shoal.job.optim import OptimOptions
from shoal.job.server import check_optimizer
from shoal.optim.schedule import learning_rate
from shoal.optim.update import Update, counted, counts, is_outer
from shoal.shard import Shard
from shoal.sync.server.rules import Rules


def token_schedule(options: OptimOptions, global_batch: int, steps: int) -> Callable[[int], float]:
    """Learning rate by samples used up, all of the same number of tokens, for a run of steps × global_batch of them.

    The schedule of all-reduce, whose step n begins at sample n × global_batch, and between steps what lies between:
    however many workers push however much, the rate is the same at the same place in the data.
    """

    def rate(samples: int) -> float:
        return learning_rate(options, samples / global_batch, steps)

    return rate


def rate_factor(rules: Rules, staleness: int) -> float:
    """`rate`: the learning rate of a gradient that is τ commits old is divided by (1 + τ)^p.

    Zhang, Gupta, Lian and Liu 2016, "Staleness-aware Async-SGD for Distributed Deep Learning", section 3.2 (α/τ;
    here 1 + τ, so that τ = 0 changes nothing).
    """
    return (1.0 + staleness) ** -rules.power if rules.compensation == "rate" else 1.0


def weight_factor(rules: Rules, staleness: int) -> float:
    """`age`: a gradient that is τ commits old counts (1 + τ)^−p times before it enters momentum and second moments.

    Xie, Koyejo and Gupta 2019, "Asynchronous Federated Optimization", section 5.2 (polynomial weights); p = ½ as in
    Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation". With AdamW a rate changes how
    far a step goes, a weight how much of the gradient is in the direction of this step and the next ones.
    """
    return (1.0 + staleness) ** -rules.power if rules.compensation == "age" else 1.0


def delay_compensated(gradient: Tensor, value: Tensor, pulled: Tensor, strength: float) -> Tensor:
    """`dc`: g + λ g ⊙ g ⊙ (w − w_pulled), an estimate of the gradient at w. All of one shape; in place, and returned.

    Zheng et al. 2017, "Asynchronous Stochastic Gradient Descent with Delay Compensation", section 3 (DC-ASGD-c: g ⊙ g
    in the place of the Hessian's diagonal). g is of the mean, clipped.
    """
    return gradient.addcmul_(gradient.square(), value - pulled, value=strength)


def look_ahead(update: Update, updates: int, lr: float) -> list[Tensor]:
    """`look-ahead`: where the optimizer alone takes each shard of `update` in so many updates without a gradient.

    New tensors, in the order of `update.shards`. updates: U, expected between a pull and its commit. With SGD's
    m ← β m + g, w ← w − lr m: w − lr (β + … + β^U) m. With AdamW: w − lr Σ_s (β₁^s m / (1 − β₁^(n+s))) /
    (√(β₂^s v / (1 − β₂^(n+s))) + ε), s = 1 … U, after n updates. Weight decay is left out.

    That gradients are computed where momentum will have taken the weights: Hakimi, Barkai, Gabel and Schuster 2019,
    "Taming Momentum in a Distributed Asynchronous Environment" (DANA). Its algorithm is another: one momentum vʲ for
    each worker, and a pull of w − lr β Σⱼ vʲ. Here there is one for all gradients, which is followed for U updates, a
    prediction of weights like that of Chen, Yang and Cheng 2018, "Efficient and Robust Parallel DNN Training through
    Model Parallelism on Multi-GPU Platform" (SpecTrain: w − U lr m), and for Adam Guan et al. 2019, "XPipe".
    """
    if update.options.name not in ("sgd", "adamw"):
        raise JobError(
            f"look-ahead does not know where optim.name={update.options.name} goes without a gradient",
            fix="optimizer sgd or adamw, or another compensation",
        )
    values = [shard.local.clone() for shard in update.shards]
    if "momentum" in update.slots:
        beta = update.options.momentum
        way = sum(beta**step for step in range(1, updates + 1))
        torch._foreach_add_(values, update.slots["momentum"], alpha=-lr * way)
        return values
    done = update.done - update.since
    if not done:
        return values
    beta1, beta2 = update.options.betas
    for value, mean, square in zip(values, update.slots["exp_avg"], update.slots["exp_avg_sq"], strict=True):
        for step in range(1, updates + 1):
            unbiased = square * (beta2**step / (1 - beta2 ** (done + step)))
            factor = lr * beta1**step / (1 - beta1 ** (done + step))
            value.addcdiv_(mean, unbiased.sqrt_().add_(update.options.eps), value=-factor)
    return values


class DelayedNesterov:
    """`delayed-nesterov`: momentum takes in the mean of `period` gradients at a time; each moves the weights at once.

    Liu et al. 2024, "Asynchronous Local-SGD Training for Language Modeling", algorithm 3, with c = 0:
    w ← w − lr · g/N after each gradient, and after every N-th one m ← β m + (their mean), w ← w − lr · β m.
    Weight decay is decoupled, of matrices, as in `Update`; a gradient's share of it is an N-th, too: before each,
    w ← (1 − lr λ / N) w. Has the interface of `Update`.
    """

    def __init__(self, shards: list[Shard], options: OptimOptions, period: int, outer: bool = False):
        """period: N, about the number of workers. outer: gradients are how far workers' own steps took them."""
        assert period > 0
        self.options, self.period, self.outer = options, period, outer
        self.done = self.since = 0
        self.shards = [shard for shard in shards if shard.local.numel()]
        self.slots = {slot: [torch.zeros_like(s.local) for s in self.shards] for slot in ("momentum", "gathered")}

    @torch.no_grad()
    def apply(self, scale: float, lr: float) -> float:
        """One update from the shards' gradients times `scale`, at rate `lr`."""
        values = [shard.local for shard in self.shards]
        gradients = [g for shard in self.shards if (g := shard.grad) is not None]
        # Norms and biases do not decay.
        matrices = [shard.local for shard in self.shards if len(shard.global_shape) > 1]
        momentum, gathered = self.slots["momentum"], self.slots["gathered"]
        torch._foreach_mul_(gradients, scale / self.period)
        torch._foreach_add_(gathered, gradients)
        if self.options.weight_decay and matrices:
            torch._foreach_mul_(matrices, 1 - lr * self.options.weight_decay / self.period)
        torch._foreach_add_(values, gradients, alpha=-lr)
        self.done += 1
        if (self.done - self.since) % self.period == 0:
            torch._foreach_mul_(momentum, self.options.momentum)
            torch._foreach_add_(momentum, gathered)
            torch._foreach_zero_(gathered)
            torch._foreach_add_(values, momentum, alpha=-lr * self.options.momentum)
        return lr

    def state(self) -> list[Shard]:
        """The optimizer's tensors: `<slot>.<parameter>`."""
        return [
            Shard(f"{slot}.{shard.name}", shard.global_shape, shard.offsets, tensor, owner=shard.owner)
            for slot, tensors in self.slots.items()
            for shard, tensor in zip(self.shards, tensors, strict=True)
        ]

    def values(self) -> dict[str, Any]:
        return counts(self.done, self.since, self.outer)

    def restore(self, values: dict[str, Any]) -> None:
        """After the tensors of `state()` have been filled, or none of them where they are of another kind."""
        self.done, self.since = counted(values, anew=is_outer(values) != self.outer)


def optimizer(rules: Rules, shards: Sequence[Shard], options: OptimOptions, steps: int) -> Update | DelayedNesterov:
    """What a server shard updates its parameters with. Raises JobError where the compensation does not know it."""
    check_optimizer(rules.compensation, options.name)
    if rules.compensation == "delayed-nesterov":
        return DelayedNesterov(list(shards), options, rules.workers, rules.outer)
    if rules.outer:
        # With a period of one: w ← w − lr · (g + β m), m ← β m + g. Nesterov momentum.
        return DelayedNesterov(list(shards), options, 1, outer=True)
    return Update(list(shards), options, steps)
