"""Several tensors stored as one: the same products and gradients as apart, and pieces that are views of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.models.spec import parameters
from shoal.models.storage import FusedLinear, canonical, stored_in
from tests.models import experts, tiny
from tests.numbers import largest

BOUND = 1e-13
"""In float64: sums of 5 numbers, which a matrix of another height may add up in another order."""


def fused(bias: bool) -> FusedLinear:
    torch.manual_seed(0)
    layer = FusedLinear(5, {"q_proj": 6, "k_proj": 3, "v_proj": 3}, bias).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def apart(layer: FusedLinear, x_BLD: Tensor, order: tuple[int, ...] = (0, 1, 2)) -> tuple[list[Tensor], list[Tensor]]:
    """By the pieces' own matrices: (outputs, gradients of what is learned, all weights before all biases) for
    gradients of the outputs that count up."""
    pieces = [[p.clone().requires_grad_() for p in q.detach().split(layer.sizes)] for q in layer.parameters()]
    outputs = [F.linear(x_BLD, *(kind[i] for kind in pieces)) for i in order]
    torch.cat(outputs, -1).backward(counting(x_BLD, layer))
    return outputs, [torch.cat([p.grad for p in kind]) for kind in pieces]


def counting(x_BLD: Tensor, layer: FusedLinear) -> Tensor:
    rows = x_BLD.shape[0] * x_BLD.shape[1]
    return torch.arange(rows * sum(layer.sizes), dtype=torch.float64).view(*x_BLD.shape[:2], -1) / rows


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return largest(((a - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_is_the_products_apart(bias: bool) -> None:
    layer, x_BLD = fused(bias), torch.randn(2, 3, 5, dtype=torch.float64)
    outputs = list(layer(x_BLD))
    torch.cat(outputs, -1).backward(counting(x_BLD, layer))
    right, gradients = apart(layer, x_BLD)
    assert distance(outputs, right) < BOUND
    assert distance([p.grad for p in layer.parameters()], gradients) < BOUND
    # Planted bug: k and v exchanged.
    outputs_of_bug, gradients_of_bug = apart(layer, x_BLD, order=(0, 2, 1))
    assert distance(outputs_of_bug, right) > 100 * BOUND
    assert distance(gradients_of_bug, gradients) > 100 * BOUND


def test_names_are_those_of_modules_beside_it() -> None:
    model = tiny.decoder(tiny.CASES["biases"])
    path = "model.layers.1.self_attn"
    pieces = [(f"{path}.q_proj.bias", 32), (f"{path}.k_proj.bias", 16), (f"{path}.v_proj.bias", 16)]
    assert stored_in(model, f"{path}.qkv_proj.bias") == pieces
    assert stored_in(model, f"{path}.o_proj.bias") is None
    assert stored_in(model.model.layers["1"].mlp, "gate_up_proj.weight") == [
        ("gate_proj.weight", 56), ("up_proj.weight", 56),
    ]  # fmt: skip


@pytest.mark.parametrize("model", [tiny.decoder(tiny.CASES["biases"]), experts.decoder("qwen2_moe")])
def test_canonical_tensors_are_views_and_together_all_there_is(model) -> None:
    seen = dict(canonical(model))
    assert seen.keys() == parameters(model.options).keys()
    for tensor in seen.values():
        tensor.fill_(3.0)
    assert all((tensor == 3.0).all() for tensor in (*model.parameters(), *model.buffers()))
    assert sum(t.numel() for t in seen.values()) == sum(t.numel() for t in (*model.parameters(), *model.buffers()))


def test_a_module_of_others_may_have_an_attribute_of_that_name() -> None:
    module = torch.nn.Linear(2, 3)
    module.stored = torch.zeros(3)
    assert stored_in(module, "weight") is None
