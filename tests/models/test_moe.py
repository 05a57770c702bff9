"""The layer of experts against a loop over tokens, within 1e-12 in float64; what it notes, and when."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight
from torch.utils.checkpoint import checkpoint

from shoal.models import build
from shoal.models.moe import MoE, Usage
from shoal.ops import route
from shoal.ops.loss import chunked_cross_entropy
from tests.models import experts, tiny
from tests.numbers import largest

BOUND = 1e-12


def distance(a: Tensor, b: Tensor) -> float:
    """Of the difference's norm from that of b."""
    return ((a - b).norm() / b.norm()).item()


def layer(name: str = "deepseek_v3", seed: int = 0, **options: Any) -> MoE:
    """In float64 and training mode, with random weights that choose experts unevenly."""
    moe = MoE(replace(experts.CASES[name], **options)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in moe.state_dict().values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, dtype=torch.float64, generator=generator))
    return moe


def rows(number: int, length: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, length, 32, dtype=torch.float64, generator=generator).requires_grad_()


def by_token(moe: MoE, x_BLD: Tensor, valid_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and Σ over rows of valid tokens × balance loss, by the formulas, one token after the other."""
    o = moe.options
    out_BLD, balance = torch.zeros_like(x_BLD), x_BLD.new_zeros(())
    for row, x_LD in enumerate(x_BLD):
        room = [math.ceil(o.capacity_factor * o.num_experts_per_tok * len(x_LD) / o.num_experts)] * o.num_experts
        fraction_E, share_E = [0.0] * o.num_experts, torch.zeros(o.num_experts, dtype=x_LD.dtype)
        tokens = int(valid_BL[row].sum())
        for place, x_D in enumerate(x_LD):
            out_BLD[row, place] = _shared(moe, x_D)
            if not valid_BL[row, place]:
                continue
            logits_E = moe.gate.weight @ x_D
            scores_E = logits_E.sigmoid() if moe.gate.sigmoid else logits_E.softmax(0)
            chosen = _choice(moe, scores_E)
            share_E = share_E + scores_E / scores_E.sum() / tokens
            total = sum(scores_E[e] for e in chosen) if o.norm_topk_prob else 1.0
            for e in chosen:
                fraction_E[e] += o.num_experts / (o.num_experts_per_tok * tokens)
                room[e] -= 1
                if room[e] >= 0 or not o.capacity_factor:
                    weight = scores_E[e] / total * o.routed_scaling_factor
                    out_BLD[row, place] = out_BLD[row, place] + weight * _expert(moe, e, x_D)
        balance = balance + tokens * sum(f * p for f, p in zip(fraction_E, share_E, strict=True))
    return out_BLD, balance


def _choice(moe: MoE, scores_E: Tensor) -> list[int]:
    o, size = moe.options, moe.options.num_experts // moe.options.n_group
    bias_E = moe.gate.e_score_correction_bias
    wanted = (scores_E if bias_E is None else scores_E + bias_E).tolist()
    judges = 1 if o.family == "deepseek_v2" else 2
    best = {g: sum(sorted(wanted[g * size : (g + 1) * size])[-judges:]) for g in range(o.n_group)}
    kept = sorted(best, key=lambda g: -best[g])[: o.topk_group]
    return sorted((e for e in range(o.num_experts) if e // size in kept), key=lambda e: -wanted[e])[
        : o.num_experts_per_tok
    ]


def _expert(moe: MoE, e: int, x_D: Tensor) -> Tensor:
    own = moe.experts
    return own.down_EDF[e] @ (F.silu(own.gate_EFD[e] @ x_D) * (own.up_EFD[e] @ x_D))


def _shared(moe: MoE, x_D: Tensor) -> Tensor:
    if not moe.shared_name:
        return torch.zeros_like(x_D)
    out_D = moe.get_submodule(moe.shared_name)(x_D)
    return out_D if moe.shared_expert_gate is None else moe.shared_expert_gate(x_D).sigmoid() * out_D


def furthest(moe: MoE, x_BLD: Tensor, valid_BL: Tensor) -> float:
    """Distance from the loop of outputs at valid places and of all gradients, whichever is largest."""
    parameters = [x_BLD, *moe.parameters()]
    weight_BLD = valid_BL[..., None] * torch.linspace(-1, 1, x_BLD.numel(), dtype=x_BLD.dtype).view_as(x_BLD)
    ours_BLD = moe(x_BLD, valid_BL)
    loop_BLD, balance = by_token(moe, x_BLD, valid_BL)
    ours = torch.autograd.grad((ours_BLD * weight_BLD).sum(), parameters)
    total = (loop_BLD * weight_BLD).sum() + moe.options.router_aux_loss_coef * balance
    loop = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    usage = moe.take_usage()
    assert usage is not None
    pairs = [(ours_BLD * valid_BL[..., None], loop_BLD * valid_BL[..., None]), *zip(ours, loop, strict=True)]
    differences = [((a - b).norm() / b.norm().clamp(min=1.0)).item() for a, b in pairs]
    return largest([*differences, abs(usage.balance_sum.item() - balance.item()) / balance.item()])


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(list(experts.CASES)),
    capacity=st.sampled_from([0.0, 0.4, 1.0, 1.5]),
    filled=st.integers(0, 6),
    seed=st.integers(0, 99),
)
def test_equals_a_loop_over_tokens(name: str, capacity: float, filled: int, seed: int) -> None:
    """Outputs, gradients with the balance loss in them, and what is reported of it."""
    moe = layer(name, seed, capacity_factor=capacity, router_aux_loss_coef=0.7)
    valid_BL = torch.arange(9)[None] < torch.tensor([[9], [9 - filled]])
    assert furthest(moe, rows(2, 9, seed), valid_BL) < BOUND


def _first_come_over_rows(index_BLK: Tensor, valid_BL: Tensor, number: int, capacity: int) -> Tensor:
    return _capacity(index_BLK.flatten(0, 1)[None], valid_BL.flatten()[None], number, capacity).view_as(index_BLK)


def _of_the_batch(share_BLE: Tensor, counts_BE: Tensor, valid_BL: Tensor, choices: int) -> Tensor:
    return _balance(share_BLE.flatten(0, 1)[None], counts_BE.sum(0, keepdim=True), valid_BL.flatten()[None], choices)


_capacity, _balance, _counts, _weights = route.within_capacity, route.balance_loss, route.counts, route.weights
LAYER_BUGS: dict[str, tuple[str, Callable[..., Any]]] = {
    "rows compete for room": ("within_capacity", _first_come_over_rows),
    "filled places take room": ("within_capacity", lambda i, v, n, c: _capacity(i, torch.ones_like(v), n, c)),
    "balance of the batch": ("balance_loss", _of_the_batch),
    "filled places counted": ("counts", lambda i, v, n: _counts(i, torch.ones_like(v), n)),
    "filled places in the shares": ("balance_loss", lambda s, c, v, k: _balance(s, c, torch.ones_like(v), k)),
    "not weighed by tokens": ("balance_loss", lambda s, c, v, k: _balance(s, c, v, k) / v.shape[1]),
    "weights not normalised": ("weights", lambda s, i, n, scale: _weights(s, i, False, scale)),
}


@pytest.mark.parametrize("bug", LAYER_BUGS)
def test_loop_sees_planted_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = layer(capacity_factor=0.6, router_aux_loss_coef=0.7)
    valid_BL = torch.ones(2, 9, dtype=torch.bool)
    valid_BL[0, 2:5] = False
    assert furthest(moe, rows(2, 9), valid_BL) < BOUND
    monkeypatch.setattr(route, *LAYER_BUGS[bug])
    assert furthest(moe, rows(2, 9), valid_BL) > 1e-4


def test_each_row_answers_for_itself() -> None:
    """A batch's gradients and usage are the sums of its rows', with capacity and balance loss on."""
    moe, x_BLD = layer(capacity_factor=0.6, router_aux_loss_coef=0.7), rows(4, 9)
    moe(x_BLD).sin().sum().backward()
    together, usage = [p.grad.clone() for p in moe.parameters()], moe.take_usage()
    moe.zero_grad()
    for x_LD in x_BLD.detach():
        moe(x_LD[None]).sin().sum().backward()
    apart = moe.take_usage()
    assert usage is not None
    assert apart is not None
    assert torch.equal(usage.counts_E, apart.counts_E)
    assert usage.counts_E.sum() == 4 * 9 * 3
    assert usage.dropped == apart.dropped > 0
    assert distance(apart.balance_sum, usage.balance_sum) < BOUND
    assert largest(distance(p.grad, t) for p, t in zip(moe.parameters(), together, strict=True)) < BOUND


# --- What is noted, and when


def recomputed(moe: MoE, x_BLD: Tensor, again: bool) -> tuple[list[Tensor], Usage]:
    moe.zero_grad()
    y_BLD = checkpoint(moe, x_BLD, use_reentrant=False) if again else moe(x_BLD)
    y_BLD.sin().sum().backward()
    usage = moe.take_usage()
    assert usage is not None
    return [p.grad for p in moe.parameters()], usage


def test_recomputed_activations_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x_BLD = layer(router_aux_loss_coef=0.7), rows(2, 9)
    plain, once = recomputed(moe, x_BLD, False)
    again, twice = recomputed(moe, x_BLD, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert torch.equal(once.counts_E, twice.counts_E)
    assert once.balance_sum == twice.balance_sum

    def in_forward(self: MoE, weight_BLK: Tensor, *args: Tensor) -> Tensor:
        self._note(self.gate.weight.new_ones(8), torch.zeros(()), torch.zeros(()))
        return weight_BLK

    monkeypatch.setattr(MoE, "_watch", in_forward)
    assert recomputed(moe, x_BLD, True)[1].counts_E.sum() == 2 * recomputed(moe, x_BLD, False)[1].counts_E.sum()


def test_backward_in_two_halves_counts_once() -> None:
    """As zero-bubble pipeline schedules do it: gradients of inputs first, those of weights later."""
    moe, x_BLD = layer(router_aux_loss_coef=0.7), rows(2, 9)
    plain, once = recomputed(moe, x_BLD, False)
    moe.zero_grad()
    y_BLD = moe(x_BLD)
    _, groups = stage_backward_input([y_BLD], [y_BLD.detach().cos()], [x_BLD], iter(moe.parameters()))
    stage_backward_weight(iter(moe.parameters()), groups)
    halves = moe.take_usage()
    assert halves is not None
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, moe.parameters(), strict=True))
    assert torch.equal(once.counts_E, halves.counts_E)
    assert once.balance_sum == halves.balance_sum


def test_nothing_is_noted_without_a_backward_pass() -> None:
    moe, x_BLD = layer(), rows(2, 9)
    moe(x_BLD)
    with torch.no_grad():
        moe(x_BLD)
    assert moe.take_usage() is None


def test_evaluation_has_neither_capacity_nor_balance() -> None:
    limited, free = (layer(router_aux_loss_coef=c, capacity_factor=c) for c in (0.4, 0.0))
    outputs = [limited.eval()(rows(2, 9)), free(rows(2, 9))]
    assert torch.equal(*outputs)
    for output in outputs:
        output.sum().backward()
    assert limited.take_usage() is None
    assert torch.equal(limited.gate.weight.grad, free.gate.weight.grad)


def test_balance_loss_of_known_uses() -> None:
    """1 where shares are even, E/K where all tokens choose the same with certainty, here 6/1; times 2 × 5 tokens."""
    index_BLK, valid_BL = torch.zeros(2, 5, 1, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool)
    counts_BE = route.counts(index_BLK, valid_BL, 6)
    even = torch.full((2, 5, 6), 1 / 6, dtype=torch.float64)
    assert route.balance_loss(even, counts_BE, valid_BL, 1).item() == pytest.approx(10.0, rel=1e-14)
    certain = F.one_hot(index_BLK[..., 0], 6).double()
    assert route.balance_loss(certain, counts_BE, valid_BL, 1).item() == pytest.approx(60.0, rel=1e-14)


def test_rows_without_a_valid_token() -> None:
    moe, x_BLD = layer(router_aux_loss_coef=0.7), rows(1, 5)
    y_BLD = moe(x_BLD, torch.zeros(1, 5, dtype=torch.bool))
    y_BLD.sum().backward()
    usage = moe.take_usage()
    assert usage is not None
    assert usage.counts_E.sum() == usage.balance_sum == 0
    assert torch.equal(y_BLD, moe.get_submodule("shared_experts")(x_BLD))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in moe.parameters())


# --- Balance without a loss


def test_bias_moves_towards_balance() -> None:
    moe = layer(bias_update_rate=0.25)
    moe.gate.e_score_correction_bias.zero_()
    moe.rebalance_(torch.tensor([4, 0, 2, 2, 2, 2, 1, 3]))
    assert moe.gate.e_score_correction_bias.tolist() == [-0.25, 0.25, 0, 0, 0, 0, 0.25, -0.25]


def test_bias_balances_a_skewed_router() -> None:
    """The busiest expert, in multiples of the mean: from more than 1.5 to less than 1.2; the wrong way, worse."""
    moe = layer(n_group=1, topk_group=1, bias_update_rate=0.02, router_aux_loss_coef=0.0)
    x_BLD = (0.5 + rows(4, 32)).detach()  # what tokens have in common skews the router

    def busiest(steps: int, sign: int) -> float:
        moe.gate.e_score_correction_bias.zero_()
        for _ in range(steps):
            moe(x_BLD).sum().backward()
            usage = moe.take_usage()
            assert usage is not None
            moe.rebalance_(sign * usage.counts_E)
        return (usage.counts_E.max() / usage.counts_E.double().mean()).item()

    assert busiest(30, 1) < 1.2
    assert 1.5 < busiest(1, 1) < busiest(10, -1)


def test_a_family_without_a_bias_has_none_to_move() -> None:
    moe = layer("mixtral")
    moe.rebalance_(torch.ones(6))
    assert dict(moe.named_buffers()) == {}


# --- Precision, compiling, meta


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_autocast_equals_weights_that_arrive_in_bf16(name: str) -> None:
    """As from mixed-precision FSDP, whose buffers stay in float32."""
    model, arrived, tokens_BL = experts.decoder(name), experts.decoder(name), tiny.tokens(2, 16)
    for parameter in arrived.parameters():
        parameter.data = parameter.data.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tokens_BL), arrived(tokens_BL))


def test_meta_model_takes_no_memory() -> None:
    with torch.device("meta"):
        model = build(experts.DEEPSEEK)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_filled_places_change_nothing_elsewhere() -> None:
    """Here in front of the others, where they would take the room that is scarce."""
    moe, x_BLD = layer(capacity_factor=0.6), rows(1, 9)
    valid_BL = torch.arange(9)[None] >= 4
    other_BLD = torch.where(valid_BL[..., None], x_BLD, rows(1, 9, seed=5))
    assert torch.equal(moe(x_BLD, valid_BL)[:, 4:], moe(other_BLD, valid_BL)[:, 4:])
    assert not torch.equal(moe(x_BLD)[:, 4:], moe(x_BLD, valid_BL)[:, 4:])


@pytest.mark.nightly
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a compiler"
)
def test_compiled_block_goes_around_the_experts() -> None:
    def gradients(compiled: bool) -> Tensor:
        model = experts.decoder("deepseek_v3", num_hidden_layers=2)
        for block in model.blocks:
            if compiled:
                block.compile()
        labels_BL, weight_BL = tiny.tokens(2, 24, seed=1), torch.ones(2, 24)
        model(tiny.tokens(2, 24), head=lambda h, w: chunked_cross_entropy(h, w, labels_BL, weight_BL)).backward()
        assert all(m.take_usage() is not None for m in model.modules() if isinstance(m, MoE))
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch._dynamo.reset()
    assert distance(gradients(True), gradients(False)) < 1e-5
