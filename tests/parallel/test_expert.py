"""Experts on several ranks compute what one rank computes; rows are put together in their order; a checkpoint has every
tensor once; nothing is dropped in evaluation."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from shoal.models import build
from shoal.models.moe import MoE
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


def test_the_host_waits_once_a_layer(ranks):
    """For the sizes of messages, in forward; the products know theirs from the same numbers."""
    assert ranks.run("tests.parallel.expert_cases:asked", 2, seed=3) == [[["tolist"], []]] * 2


def test_sees_products_that_ask_for_their_sizes(ranks):
    results = ranks.run("tests.parallel.expert_cases:asked", 2, seed=3, told=False)
    assert results == [[["tolist"] * 3, []]] * 2


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


def by_hand(model: str) -> dict[str, float]:
    """How the first step's batch uses the experts of the first weights, token by token."""
    options, batch = cases.MODELS[model], cases.global_batch(0)
    twin = build(options).double()
    fills = parameters(options)
    for name, tensor in experts.canonical(twin):
        initialise_(tensor.detach(), name, tuple(tensor.shape), (0,) * tensor.ndim, fills[name].fill, 5)
    layers = [module for module in twin.modules() if isinstance(module, MoE)]
    scores = []
    for layer in layers:
        layer.gate.register_forward_hook(lambda module, args, scores_BLE: scores.append(scores_BLE.detach()))
    valid_BL = batch.weight_BL > 0
    twin(batch.tokens_BL, batch.position_BL, document_attend(batch.document_BL), None, valid_BL)
    balance, dropped, chosen, busiest = 0.0, 0, 0, 0.0
    for layer, scores_BLE in zip(layers, scores, strict=True):
        index_BLK, load_E = layer.gate.select(scores_BLE)[0].tolist(), [0] * options.num_experts
        for row, valid_L in enumerate(valid_BL.tolist()):
            places = [place for place, valid in enumerate(valid_L) if valid]
            share_LE = scores_BLE[row] / scores_BLE[row].sum(-1, keepdim=True)
            row_E = [0] * options.num_experts
            for place in places:
                for expert in index_BLK[row][place]:
                    row_E[expert] += 1
                    even = options.num_experts_per_tok * cases.LENGTH / options.num_experts
                    dropped += bool(options.capacity_factor) and row_E[expert] > math.ceil(
                        options.capacity_factor * even
                    )
            # DeepSeek-V3, equations 17 to 20, weighed by the row's tokens.
            fraction_E = [n * options.num_experts / (options.num_experts_per_tok * len(places)) for n in row_E]
            mean_E = share_LE[places].mean(0).tolist()
            balance += len(places) * sum(f * p for f, p in zip(fraction_E, mean_E, strict=True))
            load_E = [a + b for a, b in zip(load_E, row_E, strict=True)]
        chosen += sum(load_E)
        busiest = max(busiest, max(load_E) / (sum(load_E) / len(load_E)))
    tokens = int(valid_BL.sum()) * len(layers)
    return {"balance_loss": balance / tokens, "dropped_share": dropped / chosen, "busiest_load": busiest}


# The first stage of the second pipeline has no layer with experts.
@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("deepseek", "replicas=1"),
        ("deepseek", "fsdp=2,expert=2,micro_batch=3"),
        ("qwen", "pipeline=2,micro_batch=3,schedule=zbv"),
        ("deepseek", "pipeline=2,micro_batch=3,stages=1+3"),
        ("deepseek", "tensor=2,recompute=block"),
        ("qwen", "fsdp=2"),
        ("qwen", "context=2,expert=2"),
        ("deepseek", "replicas=2,tensor=2,expert=2"),
    ],
)
def test_the_use_of_experts_is_counted_alike_in_every_layout(ranks, model, layout):
    """Within 1e-10 of a count by hand, and in the second step of one process; on every rank."""
    case = "tests.parallel.expert_cases:used"
    results = ranks.run(case, cases.Layout.parse(layout).world, layout=layout, model=model, steps=2)
    (alone,) = ranks.run(case, 1, layout="replicas=1", model=model, steps=2)
    for result in results:
        assert result[0] == pytest.approx(by_hand(model), rel=1e-10)
        assert result[1] == pytest.approx(alone[1], rel=1e-10)
    assert alone[0]["busiest_load"] > 1.1
    assert (alone[0]["dropped_share"] > 0.01) == (model == "deepseek")
    assert alone[0] != alone[1]


def test_sees_a_count_of_one_rank(ranks):
    (first, *_) = ranks.run(
        "tests.parallel.expert_cases:used", 2, layout="fsdp=2", model="deepseek", steps=1, alone=True
    )
    right = by_hand("deepseek")
    assert all(abs(value / right[name] - 1) > 1e-8 for name, value in first[0].items())
