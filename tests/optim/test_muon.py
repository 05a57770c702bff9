"""Muon against singular values and against torch's own, and how ranks share its work."""

from __future__ import annotations

from math import prod
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.job.optim import OptimOptions
from shoal.optim.muon import orthogonal, precision
from shoal.optim.schedule import learning_rate
from shoal.optim.update import Update
from shoal.optim.whole import Held, shared_out
from shoal.shard import Shard
from tests.optim import reference

BLOCK = "model.layers.0"
MATRICES = {
    f"{BLOCK}.self_attn.q_proj.weight": (7, 5),
    f"{BLOCK}.mlp.down_proj.weight": (4, 9),
    f"{BLOCK}.mlp.experts.3.up_proj.weight": (6, 6),
}
OTHERS = {
    "model.embed_tokens.weight": (9, 5),
    f"{BLOCK}.mlp.shared_expert_gate.weight": (1, 5),
    f"{BLOCK}.self_attn.q_proj.bias": (7,),
    "model.norm.weight": (5,),
    "lm_head.weight": (9, 5),
}
SHAPES = MATRICES | OTHERS
STEPS = 20
OPTIONS = OptimOptions(name="muon", lr=0.03, warmup=0.2, betas=(0.8, 0.9))


def shards() -> list[Shard]:
    generator = torch.Generator().manual_seed(0)
    values = {n: torch.randn(shape, dtype=torch.float64, generator=generator) for n, shape in SHAPES.items()}
    return [Shard(name, SHAPES[name], (0,) * len(SHAPES[name]), value) for name, value in values.items()]


def gradients(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in SHAPES.items()}


def take(update: Update, held: list[Shard], steps: range, scale: float = 0.5) -> None:
    for step in steps:
        for shard in held:
            shard.grad = gradients(step)[shard.name]
        assert update.apply(scale, update.rate(step)) == learning_rate(update.options, step, STEPS)


def test_twenty_steps_are_those_of_singular_values_and_of_adamw_for_the_rest():
    held = shards()
    values = {s.name: s.local.clone() for s in held}
    take(Update(held, OPTIONS, STEPS), held, range(STEPS))
    muon = reference.Muon({name: values[name] for name in MATRICES}, OPTIONS)
    rest = {name: torch.nn.Parameter(values[name]) for name in OTHERS}
    groups = [
        {"params": [p for p in rest.values() if p.ndim > 1], "weight_decay": OPTIONS.weight_decay},
        {"params": [p for p in rest.values() if p.ndim == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=OPTIONS.betas, eps=OPTIONS.eps)
    for step in range(STEPS):
        for group in (*muon.param_groups, *adamw.param_groups):
            group["lr"] = learning_rate(OPTIONS, step, STEPS)
        given = {name: 0.5 * gradient for name, gradient in gradients(step).items()}
        for name, parameter in rest.items():
            parameter.grad = given[name]
        muon.step(given)
        adamw.step()
    for shard in held:
        torch.testing.assert_close(shard.local, values[shard.name], rtol=1e-10, atol=1e-12)


def test_twenty_steps_are_those_of_torch_but_for_its_bfloat16():
    """torch.optim.Muon iterates in bfloat16 in any case; here it is kept from that. Its momentum is a running mean, and
    so (1 − μ) times ours, which is a sum: the direction is the same."""
    held = [s for s in shards() if s.name in MATRICES]
    given = {s.name: torch.nn.Parameter(s.local.clone()) for s in held}
    optimizer = torch.optim.Muon(
        given.values(), weight_decay=OPTIONS.weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    with mock.patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone):
        for step in range(STEPS):
            for name, parameter in given.items():
                parameter.grad = gradients(step)[name]
            optimizer.param_groups[0]["lr"] = learning_rate(OPTIONS, step, STEPS)
            optimizer.step()
    take(Update(held, OPTIONS, STEPS), held, range(STEPS), scale=1.0)
    for shard in held:
        torch.testing.assert_close(shard.local, given[shard.name].detach(), rtol=1e-10, atol=1e-12)


@settings(max_examples=40)
@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.004, 1.0), st.sampled_from([torch.float64, torch.bfloat16]))
def test_singular_values_end_in_the_band_and_vectors_stay(rows, columns, least, dtype):
    """least: the smallest singular value, as a share of their norm at most."""
    generator = torch.Generator().manual_seed(rows * 41 + columns)
    left, _, right = torch.linalg.svd(
        torch.randn(rows, columns, dtype=torch.float64, generator=generator), full_matrices=False
    )
    values = torch.logspace(0, torch.tensor(least).log10().item(), min(rows, columns), dtype=torch.float64)
    made = orthogonal((left * (values * 1e3) @ right).to(dtype)).double()
    assert made.shape == (rows, columns)
    inner = left.mT @ made @ right.mT
    low, high = (0.68, 1.21) if dtype == torch.float64 and least / values.norm() >= 0.002 else (0.2, 1.3)
    assert (inner.diagonal() >= low).all()
    assert (torch.linalg.svdvals(made) <= high).all()
    if dtype == torch.float64:
        assert (inner - inner.diagonal().diag()).abs().max() < 1e-9


def test_where_nothing_has_a_gradient_weights_only_decay():
    held = [s for s in shards() if s.name in MATRICES]
    before = {s.name: s.local.clone() for s in held}
    for shard in held:
        shard.grad = torch.zeros_like(shard.local)
    lr = Update(held, OPTIONS, STEPS).apply(1.0, learning_rate(OPTIONS, 0, STEPS))
    for shard in held:
        torch.testing.assert_close(shard.local, before[shard.name] * (1 - lr * 0.1), rtol=1e-14, atol=0)


def test_goes_on_bitwise_from_its_saved_state():
    one, two = shards(), shards()
    first, second = Update(one, OPTIONS, STEPS), Update(two, OPTIONS, STEPS)
    take(first, one, range(6))
    for mine, theirs in zip([*two, *second.state()], [*one, *first.state()], strict=True):
        assert mine.name == theirs.name
        mine.local.copy_(theirs.local)
    second.restore(first.values())
    take(first, one, range(6, STEPS))
    take(second, two, range(6, STEPS))
    assert all(torch.equal(a.local, b.local) for a, b in zip(one, two, strict=True))


def test_a_tensor_has_the_state_of_what_updates_it():
    names = {shard.name for shard in Update(shards(), OPTIONS, STEPS).state()}
    moments = {f"{slot}.{name}" for slot in ("exp_avg", "exp_avg_sq") for name in OTHERS}
    assert names == {f"momentum.{name}" for name in MATRICES} | moments


@pytest.mark.parametrize(
    ("dtype", "where", "computed"),
    [
        (torch.float64, "cpu", torch.float64),
        (torch.float32, "cpu", torch.float32),
        (torch.float64, "meta", torch.float64),
        (torch.float32, "meta", torch.bfloat16),
    ],
)
def test_the_iteration_is_in_bfloat16_but_on_a_cpu_or_in_float64(dtype, where, computed):
    """meta stands for any device that is no CPU."""
    assert precision(torch.empty(1, dtype=dtype, device=where)) == computed


def held(rank: int, ranks: int, name: str, shape: tuple[int, int], counted: bool = True) -> Held:
    """Of a matrix whose rows the ranks share evenly."""
    size = -(-shape[0] // ranks)
    start = min(rank * size, shape[0])
    return Held(name, shape, (start, 0), (min(size, shape[0] - start), shape[1]), counted)


@given(st.lists(st.tuples(st.integers(2, 30), st.integers(2, 30)), max_size=30), st.integers(1, 5), st.integers(1, 500))
def test_work_is_shared_out_once_and_evenly_in_rounds_of_bounded_size(shapes, ranks, at_once):
    everyone = [[held(r, ranks, str(i), shape) for i, shape in enumerate(shapes)] for r in range(ranks)]
    with mock.patch("shoal.optim.whole._AT_ONCE", at_once):
        rounds = list(shared_out(everyone))
    matrices = [matrix for of_round in rounds for matrix in of_round]
    assert sorted(m.places[0].piece.name for m in matrices) == sorted(map(str, range(len(shapes))))
    costs = [sum(m.cost for m in matrices if m.worker == r) for r in range(ranks)]
    assert max(costs) - min(costs) <= max((m.cost for m in matrices), default=0)
    for of_round in rounds:
        for rank in range(ranks):
            sizes = [prod(m.shape) for m in of_round if m.worker == rank]
            assert sum(sizes[:-1]) < at_once


def test_who_has_nothing_of_a_matrix_does_not_compute_it():
    alone = [[held(0, 1, f"{rank}.{i}", (4, 4)) for i in range(rank + 1)] for rank in range(3)]
    workers = {m.places[0].piece.name: m.worker for of_round in shared_out(alone) for m in of_round}
    assert all(int(name.partition(".")[0]) == worker for name, worker in workers.items())


def test_a_matrix_of_which_a_part_is_missing_or_counted_twice_is_noticed():
    half, copy = held(0, 2, "a", (4, 4)), held(0, 1, "a", (4, 4))
    for everyone in ([[half], []], [[copy], [copy]]):
        with pytest.raises(AssertionError, match="a is not whole"):
            list(shared_out(everyone))
    copies = [[copy], [held(0, 1, "a", (4, 4), counted=False)]]
    ((matrix,),) = shared_out(copies)
    assert [place.rank for place in matrix.places] == [0, 1]
