"""Experts on several ranks compute what one rank computes; rows are put together in their order; a checkpoint has every
tensor once; nothing is dropped in evaluation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shoal.models import build
from shoal.models.spec import parameters
from shoal.ops.attention import document_attend
from shoal.ops.initialise import initialise_
from tests.equivalence import cases
from tests.models import experts
from tests.parallel import expert_cases


def by_loop(layer, x_ND, index_NK, weight_NK):
    """Token by token, with matrices of torch's own."""
    y_ND = []
    for x_D, index_K, weight_K in zip(x_ND, index_NK.tolist(), weight_NK, strict=True):
        y_D = torch.zeros_like(x_D)
        for expert, weight in zip(index_K, weight_K, strict=True):
            if expert < expert_cases.NUMBER:
                gate_F, up_F = layer.gate_EFD[expert] @ x_D, layer.up_EFD[expert] @ x_D
                y_D = y_D + weight * (layer.down_EDF[expert] @ (F.silu(gate_F) * up_F))
        y_ND.append(y_D)
    return torch.stack(y_ND) if y_ND else x_ND


@pytest.mark.parametrize("world", [2, 3])
def test_dispatch_is_a_loop_over_tokens_forward_and_backward(ranks, world):
    """Also for a rank without tokens, experts without tokens, and choices of no expert. Float64, within 1e-12."""
    results = ranks.run("tests.parallel.expert_cases:dispatch", world, seed=3)
    layer = expert_cases.whole_layer()
    total = torch.zeros((), dtype=torch.float64)
    inputs = [expert_cases.tokens(rank, 3) for rank in range(world)]
    for rank, (x_ND, index_NK, weight_NK) in enumerate(inputs):
        x_ND.requires_grad_(), weight_NK.requires_grad_()
        y_ND = by_loop(layer, x_ND, index_NK, weight_NK)
        total = total + (y_ND.sin() * (1 + rank)).sum()
        got = torch.tensor(results[rank]["y"], dtype=torch.float64)
        assert torch.allclose(got.view_as(y_ND), y_ND, rtol=0, atol=1e-12 * y_ND.norm().item())
    total.backward()
    for result, (x_ND, _, weight_NK) in zip(results, inputs, strict=True):
        for name, tensor in (("x", x_ND), ("weight", weight_NK)):
            got, right = torch.tensor(result[name], dtype=torch.float64), tensor.grad
            if right is not None:
                assert (got.view_as(right) - right).norm() <= 1e-12 * right.norm(), name
    for name, parameter in layer.named_parameters():
        pieces = sorted(result["experts"][name] for result in results)
        assert [first for first, _ in pieces] == [expert_cases.NUMBER // world * rank for rank in range(world)]
        got = torch.cat([torch.tensor(values, dtype=torch.float64) for _, values in pieces])
        assert (got - parameter.grad).norm() <= 1e-12 * parameter.grad.norm(), name


@pytest.mark.parametrize(
    "layout", ["context=2", "context=3,context_by=ulysses", "tensor=2", "context=2,tensor=2", "fsdp=2,context=2"]
)
def test_rows_are_put_together_in_their_order(ranks, layout):
    what = cases.Layout.parse(layout)
    results = ranks.run("tests.parallel.expert_cases:rows", what.world, layout=layout, length=24)
    assert all(result["whole"] and result["own"] for result in results)
    assert sum(result["first"] for result in results) == what.fsdp
    assert {result["positions"] for result in results} == {24 // what.context // what.tensor}


@pytest.mark.parametrize(
    "layout",
    [
        "replicas=1",
        "replicas=2,fsdp=2,expert=2",
        "fsdp=3",
        "tensor=2",
        "tensor=4,expert=2",
        "fsdp=2,context=2,expert=2",
        "pipeline=2,fsdp=2,expert=2,micro_batch=1",
    ],
)
def test_a_checkpoint_has_every_element_once(ranks, layout):
    """Of weights, of the bias that is not learned, and of the optimizer's state of what is."""
    specs = parameters(cases.DEEPSEEK)
    wanted = {name: spec.shape for name, spec in specs.items()}
    for slot in ("exp_avg", "exp_avg_sq"):
        wanted |= {f"{slot}.{name}": spec.shape for name, spec in specs.items() if spec.learned}
    times = {name: torch.zeros(shape) for name, shape in wanted.items()}
    for result in ranks.run("tests.parallel.expert_cases:saved", cases.Layout.parse(layout).world, layout=layout):
        for name, offsets, shape in result:
            times[name][cases.place(offsets, torch.empty(shape))] += 1
    assert all((count == 1).all() for count in times.values())


@pytest.mark.parametrize("layout", ["replicas=1", "fsdp=2,expert=2", "tensor=2"])
def test_evaluation_drops_and_notes_nothing(ranks, layout):
    results = ranks.run(
        "tests.parallel.expert_cases:held_out", cases.Layout.parse(layout).world, layout=layout, model="deepseek"
    )
    assert all(result["training"] and not result["noted"] for result in results)
    twin, batch = build(cases.DEEPSEEK).double(), cases.global_batch(0)
    fills = parameters(twin.options)
    for name, tensor in experts.canonical(twin):
        initialise_(tensor.detach(), name, tuple(tensor.shape), (0,) * tensor.ndim, fills[name].fill, 5)

    def loss() -> float:
        with torch.no_grad():
            logits_BLV = twin(
                batch.tokens_BL, batch.position_BL, document_attend(batch.document_BL), None, batch.weight_BL > 0
            )
        nll_BL = F.cross_entropy(logits_BLV.transpose(1, 2), batch.labels_BL, reduction="none")
        return (nll_BL * batch.weight_BL).sum().item()

    dropping = loss()
    twin.eval()
    right = loss()
    assert abs(dropping / right - 1) > 1e-4, "the limit bites, so that it could be seen"
    assert sum(result["loss"] for result in results) == pytest.approx(right, rel=1e-10)
    assert sum(result["weight"] for result in results) == batch.weight_BL.sum().item()
