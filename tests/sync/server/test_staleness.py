"""Compensations of staleness against their equations."""

from __future__ import annotations

import pytest
import torch

from shoal.errors import JobError
from shoal.job.optim import OptimOptions
from shoal.optim.schedule import learning_rate
from shoal.optim.update import Update, counts
from shoal.shard import Shard
from shoal.sync.server.messages import Apply, Key
from shoal.sync.server.parameters import Parameters
from shoal.sync.server.rules import Rules
from shoal.sync.server.staleness import (
    DelayedNesterov,
    delay_compensated,
    look_ahead,
    optimizer,
    rate_factor,
    token_schedule,
    weight_factor,
)


def shards(seed: int = 0) -> list[Shard]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((6, 4), (5,))]
    return [Shard(name, tuple(v.shape), (0,) * v.dim(), v) for name, v in zip(("a", "b"), values, strict=True)]


def gradients(seed: int) -> list[torch.Tensor]:
    return [shard.local for shard in shards(1000 + seed)]


def apply(update, count: int, *, zero: bool = False, lr: float = 0.05, start: int = 0) -> None:
    for step in range(start, start + count):
        for shard, gradient in zip(update.shards, gradients(step), strict=True):
            shard.grad = torch.zeros_like(gradient) if zero else gradient
        update.apply(1.0, lr)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_the_rate_by_tokens_is_that_by_steps_at_every_step(schedule):
    options = OptimOptions(schedule=schedule, warmup=0.2)
    rate = token_schedule(options, 32, 50)
    assert [rate(32 * step) for step in range(50)] == [learning_rate(options, step, 50) for step in range(50)]
    between = [rate(32 * 4 + 8 * quarter) for quarter in range(5)]
    assert between == sorted(between)
    assert len(set(between)) == 5


def test_rate_and_age_fall_with_staleness():
    rate, age = Rules("asp", compensation="rate", strength=2.0), Rules("asp", compensation="age")
    assert [rate_factor(rate, late) for late in (0, 1, 3)] == [1.0, 0.25, 0.0625]
    assert [weight_factor(age, late) for late in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
    assert rate_factor(age, 3) == weight_factor(rate, 3) == 1.0


def test_delay_compensation_is_exact_where_the_hessian_is_the_squared_gradient():
    """f = −ln w: f' = −1/w and f'' = 1/w² = f'², so to first order the compensated gradient is the one at w."""
    pulled = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    value = pulled * 1.001
    exact, stale = -1 / value, -1 / pulled
    found = delay_compensated(stale.clone(), value, pulled, 1.0)
    assert (found - exact).abs().max() < 0.002 * (stale - exact).abs().max()
    assert torch.equal(delay_compensated(stale.clone(), value, pulled, 0.0), stale)


def test_the_shard_compensates_from_what_the_worker_pulled():
    rules = Rules("asp", compensation="dc", strength=0.5)
    options = OptimOptions(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0)
    held = Parameters(shards(), rules, options, 10)
    pulled = held.freeze()
    first = Apply(1, (Key(1, 0, 0),), 0.25, 0.1, 0)
    held.apply(gradients(0), first, None)
    now = held.freeze()
    held.apply(gradients(1), Apply(2, (Key(0, 0, 0),), 0.25, 0.1, 1), pulled)
    for old, start, gradient, shard in zip(pulled, now, gradients(1), held.shards, strict=True):
        mean = gradient * 0.25
        expected = start - 0.1 * (mean + 0.5 * mean * mean * (start - old))
        torch.testing.assert_close(shard.local, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("updates", [1, 3])
def test_look_ahead_is_where_the_optimizer_goes_without_gradients(name, updates):
    options = OptimOptions(name=name, weight_decay=0.0)
    update = Update(shards(), options, 10)
    apply(update, 4)
    before = [shard.local.clone() for shard in update.shards]
    ahead = look_ahead(update, updates, 0.05)
    assert all(torch.equal(shard.local, old) for shard, old in zip(update.shards, before, strict=True))
    apply(update, updates, zero=True)
    for shard, there in zip(update.shards, ahead, strict=True):
        torch.testing.assert_close(there, shard.local, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ahead[0], before[0])


def test_look_ahead_goes_by_the_updates_that_the_moments_have_seen():
    """Not by those that the weights had before, of another optimizer."""
    new, after = (Update(shards(), OptimOptions(weight_decay=0.0), 10) for _ in range(2))
    after.restore({"updates": 100, "outer": True})
    for update in (new, after):
        apply(update, 2)
    for mine, theirs in zip(look_ahead(after, 3, 0.05), look_ahead(new, 3, 0.05), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("outer", [False, True])
def test_delayed_nesterov_begins_with_nothing_after_an_optimizer_of_the_other_kind(outer):
    """Momentum takes in its first mean after a whole period, whenever that is; of its own kind it goes on."""
    new, after, same = (DelayedNesterov(shards(), OptimOptions(name="sgd"), 3, outer) for _ in range(3))
    after.restore({"updates": 4, "outer": not outer})
    same.restore({"updates": 4, "outer": outer})
    for update in (new, after, same):
        apply(update, 3)
    assert same.values() == counts(7, 0, outer)
    assert after.values() == counts(7, 4, outer)
    for mine, theirs in zip(after.slots["momentum"], new.slots["momentum"], strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(same.slots["momentum"][0], new.slots["momentum"][0])


def test_look_ahead_is_what_workers_pull():
    rules = Rules("asp", workers=3, compensation="look-ahead")
    held = Parameters(shards(), rules, OptimOptions(name="sgd", weight_decay=0.0), 10)
    held.apply(gradients(0), Apply(1, (Key(0, 0, 0),), 1.0, 0.1, 0), None)
    assert isinstance(held.optimizer, Update)
    for pulled, there in zip(held.freeze(), look_ahead(held.optimizer, 2, 0.1), strict=True):
        assert torch.equal(pulled, there)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_delayed_nesterov_follows_its_equations(decay):
    """Of shard a, a matrix, and b, a vector, which does not decay."""
    options, period, lr = OptimOptions(name="sgd", momentum=0.9, weight_decay=decay), 3, 0.05
    update = DelayedNesterov(shards(), options, period)
    values = [shard.local.clone() for shard in shards()]
    momentum = [torch.zeros_like(value) for value in values]
    gathered = [torch.zeros_like(value) for value in values]
    for step in range(7):
        for i, gradient in enumerate(gradients(step)):
            gathered[i] += gradient
            shrunk = values[i] * (1 - lr * decay / period) if i == 0 else values[i]
            values[i] = shrunk - lr * gradient / period
            if (step + 1) % period == 0:
                momentum[i] = 0.9 * momentum[i] + gathered[i] / period
                values[i] -= lr * 0.9 * momentum[i]
                gathered[i] = torch.zeros_like(gathered[i])
    apply(update, 7)
    for shard, value in zip(update.shards, values, strict=True):
        torch.testing.assert_close(shard.local, value, rtol=1e-12, atol=1e-14)


def test_delayed_nesterov_decays_as_fast_as_sgd_does():
    """The same gradients, N of them a step of sgd: without momentum, to first order in lr the same weights."""
    options, period, lr = OptimOptions(name="sgd", momentum=0.0, weight_decay=2.0), 4, 1e-4
    delayed, plain = DelayedNesterov(shards(), options, period), Update(shards(), options, 10)
    apply(delayed, 3 * period, lr=lr, zero=True)
    apply(plain, 3, lr=lr, zero=True)
    whole = (shards()[0].local - plain.shards[0].local).abs()
    assert ((delayed.shards[0].local - plain.shards[0].local).abs() < 1e-3 * whole).all()
    assert torch.equal(delayed.shards[1].local, shards()[1].local)


def test_delayed_nesterov_goes_on_from_its_saved_state():
    one, two = (DelayedNesterov(shards(), OptimOptions(name="sgd"), 3) for _ in range(2))
    apply(one, 4)
    for mine, theirs in zip([*two.shards, *two.state()], [*one.shards, *one.state()], strict=True):
        mine.local.copy_(theirs.local)
    two.restore(one.values())
    apply(one, 3, start=4)
    apply(two, 3, start=4)
    assert all(torch.equal(a.local, b.local) for a, b in zip(one.shards, two.shards, strict=True))


def test_where_muon_goes_without_a_gradient_nobody_says():
    with pytest.raises(JobError, match=r"look-ahead does not know where optim\.name=muon goes"):
        look_ahead(Update(shards(), OptimOptions(name="muon"), 10), 1, 0.1)


def test_delayed_nesterov_is_not_adamw():
    with pytest.raises(JobError, match="delayed-nesterov is an optimizer of its own"):
        optimizer(Rules("asp", compensation="delayed-nesterov"), shards(), OptimOptions(name="adamw"), 10)


def test_with_a_period_of_one_it_is_nesterov_momentum():
    update = DelayedNesterov(shards(), OptimOptions(name="sgd", momentum=0.8, weight_decay=0.0), 1)
    theirs = [torch.nn.Parameter(shard.local.clone()) for shard in shards()]
    torchs = torch.optim.SGD(theirs, lr=0.05, momentum=0.8, nesterov=True)
    for step in range(5):
        for parameter, gradient in zip(theirs, gradients(step), strict=True):
            parameter.grad = gradient
        torchs.step()
    apply(update, 5)
    for shard, parameter in zip(update.shards, theirs, strict=True):
        torch.testing.assert_close(shard.local, parameter.data, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3])
def test_between_steps_the_rate_lies_between_theirs(schedule, warmup):
    options = OptimOptions(lr=0.5, schedule=schedule, warmup=warmup)
    rate = token_schedule(options, 4, 10)
    rates = [rate(samples) for samples in range(37)]
    for step in range(9):
        low, high = sorted((rates[4 * step], rates[4 * step + 4]))
        assert all(low <= between <= high for between in rates[4 * step : 4 * step + 5])
