"""The update over shards against torch's own optimizers on whole tensors."""

from __future__ import annotations

import pytest
import torch

from shoal.job.optim import OptimOptions
from shoal.optim.norm import sum_of_squares
from shoal.optim.schedule import learning_rate
from shoal.optim.update import Update
from shoal.shard import Shard

SHAPES = {"a.weight": (7, 5), "b.weight": (9, 3), "norm.weight": (5,), "b.bias": (3,)}
STEPS = 12


def shards(cut: int | None = None) -> list[Shard]:
    """Whole tensors, or each cut in two along its first dimension, the second part possibly empty."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for name, shape in SHAPES.items():
        value = torch.randn(shape, dtype=torch.float64, generator=generator)
        pieces = [(0, value)] if cut is None else [(0, value[:cut].clone()), (min(cut, shape[0]), value[cut:].clone())]
        out += [Shard(name, shape, (start, *[0] * (len(shape) - 1)), piece) for start, piece in pieces]
    return out


def gradient(step: int, shard: Shard) -> torch.Tensor:
    seed = step * 100 + list(SHAPES).index(shard.name)
    whole = torch.randn(shard.global_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return whole[shard.offsets[0] : shard.offsets[0] + shard.local.shape[0]].clone()


def oracle(options: OptimOptions) -> dict[str, torch.Tensor]:
    parameters = {s.name: torch.nn.Parameter(s.local) for s in shards()}
    groups = [
        {"params": [p for p in parameters.values() if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    if options.name == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, foreach=False)
    else:
        optimizer = torch.optim.SGD([{**g, "weight_decay": 0.0} for g in groups], momentum=options.momentum)
    for step in range(STEPS):
        lr = learning_rate(options, step, STEPS)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for s in shards():
            parameters[s.name].grad = gradient(step, s) * 0.5
        if options.name == "sgd":
            for p in groups[0]["params"]:
                p.data *= 1 - lr * options.weight_decay
        optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("name", ["adamw", "sgd"])
@pytest.mark.parametrize("cut", [None, 3, 5])
def test_equals_torch_also_over_cut_tensors(name, cut):
    options = OptimOptions(name=name, lr=0.05, warmup=0.2)
    held = shards(cut)
    update = Update(held, options, STEPS)
    for step in range(STEPS):
        for shard in held:
            shard.grad = gradient(step, shard)
        assert update.apply(0.5, update.rate(step)) == learning_rate(options, step, STEPS)
    expected = oracle(options)
    for shard in held:
        piece = expected[shard.name][shard.offsets[0] : shard.offsets[0] + shard.local.shape[0]]
        torch.testing.assert_close(shard.local, piece, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_goes_on_bitwise_from_its_saved_state(name):
    options = OptimOptions(name=name, lr=0.05)
    one, two = shards(), shards()
    first, second = Update(one, options, STEPS), Update(two, options, STEPS)

    def steps(update, held, numbers):
        for step in numbers:
            for shard in held:
                shard.grad = gradient(step, shard)
            update.apply(1.0, update.rate(update.done))

    steps(first, one, range(6))
    for mine, theirs in zip(two, one, strict=True):
        mine.local.copy_(theirs.local)
    for mine, theirs in zip(second.state(), first.state(), strict=True):
        assert mine.name == theirs.name
        mine.local.copy_(theirs.local)
    second.restore(first.values())
    steps(first, one, range(6, STEPS))
    steps(second, two, range(6, STEPS))
    assert all(torch.equal(a.local, b.local) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_state_of_an_outer_optimizer_is_none_of_its_own(name):
    """It goes on as a new one does, though the weights have had updates; and from its own state as before."""
    options = OptimOptions(name=name, lr=0.05)
    one, two, three = shards(), shards(), shards()
    new, after, again = (Update(held, options, STEPS) for held in (one, two, three))
    after.restore({"updates": 7, "since": 2, "outer": True})
    for step in range(6):
        if step == 3:
            for mine, theirs in zip([*three, *again.state()], [*two, *after.state()], strict=True):
                mine.local.copy_(theirs.local)
            again.restore(after.values())
        for update in (new, after, *([again] if step >= 3 else [])):
            for shard in update.shards:
                shard.grad = gradient(step, shard)
            update.apply(1.0, 0.05)
    assert new.values() == {"updates": 6}
    assert after.values() == again.values() == {"updates": 13, "since": 7}
    for held in (two, three):
        assert all(torch.equal(mine.local, theirs.local) for mine, theirs in zip(held, one, strict=True))


def test_the_rate_is_the_one_that_is_given():
    options = OptimOptions(name="sgd", lr=0.05, momentum=0.0, weight_decay=0.0)
    held, before = shards(), shards()
    for shard in held:
        shard.grad = gradient(0, shard)
    assert Update(held, options, STEPS).apply(0.5, 0.25) == 0.25
    for shard, old in zip(held, before, strict=True):
        torch.testing.assert_close(shard.local, old.local - 0.125 * gradient(0, shard), rtol=1e-12, atol=1e-14)


def test_norm_counts_every_element_once():
    held = shards(4)
    for shard in held:
        shard.grad = gradient(3, shard)
    whole = torch.cat([gradient(3, s).flatten() for s in shards()])
    assert sum_of_squares(held).item() == pytest.approx(whole.square().sum().item(), rel=1e-14)


def test_norm_of_huge_and_tiny_fp32_gradients_does_not_overflow_the_sum():
    held = [Shard("x", (2,), (0,), torch.zeros(2), torch.tensor([1e18, 1e18])) for _ in range(4)]
    assert sum_of_squares(held).item() == pytest.approx(8e36, rel=1e-6)


@pytest.mark.parametrize("size", [1, 255, 256, 1000, 1 << 20])
def test_the_norm_of_a_large_gradient_does_not_lose_digits(size):
    """torch's own norm in float32 is off by 1e-5 at the largest size, and by another amount for each cut of it."""
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1e-3
    exact = gradient.double().square().sum().item()
    whole = sum_of_squares([shard(gradient)]).item()
    assert whole == pytest.approx(exact, rel=2e-7)
    cuts = [shard(piece) for piece in gradient.split(max(1, size // 3))]
    assert sum_of_squares(cuts).item() == pytest.approx(whole, rel=2e-7)
    if size == 1 << 20:
        assert abs(torch.linalg.vector_norm(gradient).double().item() ** 2 / exact - 1) > 1e-6


def shard(gradient: torch.Tensor) -> Shard:
    return Shard("x", tuple(gradient.shape), (0,), torch.empty_like(gradient), gradient)
