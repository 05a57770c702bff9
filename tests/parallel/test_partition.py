"""Stages of any module: they compute, write and hold what the module does, wherever the graph is cut; the cut is
the best one; what cannot be traced is refused with the user's line."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shoal.errors import LayoutError
from shoal.parallel import facts, partition
from shoal.parallel.facts import FLOPS_PER_BYTE
from shoal.parallel.graph import Graph, trace
from shoal.parallel.partition import Stage, _hold_tensors, _Line, _replace_device, best_ends, cut

Example = tuple[Tensor, ...]


class Residual(nn.Module):
    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Conv2d(width, out, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.layers = nn.ModuleList([Residual(4, 4, 1), Residual(4, 8, 2), Residual(8, 8, 1)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)])
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ModuleList([nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)])

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = F.gelu(layer(x))
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = F.gelu(self.middle(x))
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return x


class TwoTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.item = nn.Embedding(20, 6), nn.Embedding(30, 6)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)) for _ in range(2)
        )

    def forward(self, user: Tensor, item: Tensor) -> dict[str, Tensor]:
        of_user, of_item = self.towers[0](self.user(user)), self.towers[1](self.item(item))
        return {"score": (of_user * of_item).sum(-1), "user": of_user}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.embedding = nn.Embedding(11, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.encoder(self.embedding(tokens), src_key_padding_mask=padding) @ self.embedding.weight.T


class Writes(nn.Module):
    """All that makes a cut dangerous: writes in place and through views, state, chance, a literal, odd names."""

    def __init__(self):
        super().__init__()
        # A name that a stage has itself.
        self.inputs, self.linear = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.norm, self.twice = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            self.count += 1
        y = self.norm(self.inputs(x)) * self.count
        noise = torch.rand(4, dtype=x.dtype)
        shifted = y - self.mean
        self.mean = 0.9 * self.mean + 0.1 * y.mean(0).detach()
        z = shifted * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype) + noise
        z.view(-1)[:3].mul_(2)
        left, right = self.linear(z).chunk(2, -1)
        table = torch.zeros(4, dtype=x.dtype)
        table += torch.arange(4)
        table[1:3] = left.sum()
        out = torch.cat([right.relu(), left.T.contiguous().T], -1) * table + z * noise
        return self.twice(self.twice(out).sin()), [x, self.mean * 1]


def mlp() -> nn.Module:
    return nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(6, 6), nn.Tanh())))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=13, n_positions=8, use_cache=False, **off, **special
    )
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=8, num_attention_heads=2, intermediate_size=16, vocab_size=13
    )
    return transformers.BertForMaskedLM(config).train()


def _images(channels: int) -> Example:
    return (torch.randn(2, channels, 8, 8, dtype=torch.float64),)


def _tokens(count: int) -> Tensor:
    return torch.randint(count, (2, 6))


PADDING = torch.arange(6).expand(2, 6) >= torch.tensor([[6], [4]])
MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Example]]] = {
    "mlp": (mlp, lambda: (torch.randn(3, 6, dtype=torch.float64),)),
    "resnet": (ResNet, lambda: _images(3)),
    "unet": (UNet, lambda: _images(2)),
    "two-tower": (TwoTower, lambda: (torch.randint(20, (5,)), torch.randint(30, (5,)))),
    "encoder": (Encoder, lambda: (_tokens(11), PADDING)),
    "writes": (Writes, lambda: (torch.randn(5, 4, dtype=torch.float64),)),
    "gpt2": (gpt2, lambda: (_tokens(13),)),
    "bert": (bert, lambda: (_tokens(13), (~PADDING).long())),
}


def make(name: str, device: str = "cpu") -> tuple[nn.Module, Example]:
    torch.manual_seed(0)
    build, example = MODULES[name]
    with torch.device(device):
        module = build().double()
    return module, tuple(x.to(device) for x in example())


def step(stages: Sequence[nn.Module], inputs: Example, apart: bool) -> tuple[Any, dict, dict]:
    """Output, gradients and final tensors of a step in which every element of the output has its own weight.

    apart: as ranks do it, where each stage has its own tensors, gets copies as new leaves, and sends back gradients.
    """
    torch.manual_seed(1)
    values: Any = inputs
    crossed = []
    stages = [copy.deepcopy(stage) for stage in stages] if apart else stages
    for stage in stages[:-1]:
        values = stage(*values)
        if apart:
            values, sent = receive(stage, values), values
            crossed.append((sent, values))
    output = stages[-1](*values)
    floats = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
    sum((t.flatten() @ torch.linspace(1, 2, t.numel(), dtype=t.dtype)) for t in floats).backward()
    for sent, received in reversed(crossed):
        pairs = [(s, r.grad) for s, r in zip(sent, received, strict=True) if r.grad is not None]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))
    return output, *held(stages, apart)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def held(stages: Sequence[nn.Module], apart: bool) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    """Gradients, added up where a parameter is shared, and values, which must agree where several hold a tensor."""
    gradients: dict[str, Tensor | None] = {}
    values: dict[str, Tensor] = {}
    for stage in stages:
        for name, t in tensors_of(stage).items():
            if name in values and apart:
                assert torch.equal(values[name], t)
                if t.requires_grad:
                    assert name in stage.shared
                    gradients[name] = gradients[name] + t.grad
            else:
                values[name], gradients[name] = t.detach().clone(), t.grad
    return gradients, values


def receive(stage: Stage, values: Example) -> Example:
    """Copies of what was sent, once it is what the stage had promised."""
    assert [(v.shape, v.dtype) for v in values] == stage.outputs
    assert [v.requires_grad for v in values] == stage.output_gradients
    assert all(v.is_contiguous() for v in values)
    return tuple(v.detach().clone().requires_grad_(v.requires_grad) for v in values)


def near(expected: Any, found: Any, bound: float) -> bool:
    """The same parts of the same names, each tensor within `bound` of its norm; 0: equal."""
    values, others = (dict(pytree.tree_flatten_with_path(x)[0]) for x in (expected, found))
    return values.keys() == others.keys() and all(
        torch.dist(value.double(), others[path].double()) <= bound * value.double().norm()
        if isinstance(value, Tensor) and isinstance(others[path], Tensor)
        else value is others[path]
        for path, value in values.items()
    )


@pytest.mark.parametrize("name", MODULES)
def test_three_stages_are_the_module(name: str):
    """One after the other bit for bit; apart as in `wrong_places`."""
    module, example = make(name)
    expected = step([copy.deepcopy(module)], example, False)
    for apart in False, True:
        parts = cut(trace(copy.deepcopy(module), example), 3)
        found = step(parts, example, apart)
        assert type(found[0]) is type(expected[0])
        assert near(expected, found, 1e-12 if apart else 0.0)


def wrong_places(name: str) -> list[int]:
    """Of all places where the graph may be cut in two, those at which the stages do not compute what the module does.

    Outputs, gradients and buffers within 1e-12 of their norms: gradients of a value that is used in both stages are
    added up in another order, and so are sums over one that was sent, which lies in memory without gaps.
    """
    module, example = make(name)
    expected = step([copy.deepcopy(module)], example, False)
    graph = trace(module, example)
    line = _Line(graph)
    wrong = []
    for place in np.flatnonzero(np.isfinite(line.crossing_bytes()))[1:-1]:
        parts = _hold_tensors(graph, [line.stage(0, place), line.stage(place, len(line.nodes))])
        try:
            right = near(expected, step(parts, example, True), 1e-12)
        except (RuntimeError, AssertionError):
            right = False
        wrong += [] if right else [int(place)]
    return wrong


SMALL = "mlp", "two-tower", "unet", "writes"


@pytest.mark.parametrize("name", [n if n in SMALL else pytest.param(n, marks=pytest.mark.nightly) for n in MODULES])
def test_two_stages_apart_are_the_module_wherever_it_is_cut(name: str):
    assert wrong_places(name) == []


MADE_ANEW, FORWARD = _Line._is_made_anew, Stage.forward
BUGS: dict[str, tuple[str, Any, str, Any]] = {
    "cuts between a value and a write to it": (
        "writes",
        _Line,
        "_bonds",
        lambda line: ((line.place[n], line.last[n]) for n in line.nodes if not isinstance(n.meta["val"], Tensor)),
    ),
    "running statistics in two stages": ("writes", facts, "_SILENT_WRITERS", ()),
    "random numbers drawn by both stages": (
        "writes",
        _Line,
        "_is_made_anew",
        lambda line, node, made: node.target is torch.ops.aten.rand.default or MADE_ANEW(line, node, made),
    ),
    "a written buffer taken for a constant": ("writes", _Line, "_is_fixed", lambda line, node: "mean" in node.name),
    "no gradient for what skips a stage": (
        "unet",
        Stage,
        "forward",
        lambda stage, *values: tuple(
            v.detach().requires_grad_(v.requires_grad) if any(v is x for x in values) else v
            for v in FORWARD(stage, *values)
        ),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch):
    name, place, attribute, planted = BUGS[bug]
    monkeypatch.setattr(place, attribute, planted)
    assert wrong_places(name)


def test_a_tied_parameter_is_named_and_held_by_both_stages():
    module, example = make("encoder")
    parts = cut(trace(module, example), 3)
    assert [stage.shared for stage in parts] == [{"embedding.weight": [0, 2]}, {}, {"embedding.weight": [0, 2]}]
    assert parts[0].get_parameter("embedding.weight") is parts[2].get_parameter("embedding.weight")


@pytest.mark.parametrize("name", MODULES)
def test_tensors_are_the_modules_own_under_their_names(name: str):
    module, example = make(name)
    parts = cut(trace(module, example), 3)
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    assert {n for stage in parts for n, _ in stage.named_parameters()} == parameters.keys()
    assert {n for stage in parts for n, _ in stage.named_buffers()} == buffers.keys()
    assert all(
        t is {**parameters, **buffers}[n] for stage in parts for n, t in stage.state_dict(keep_vars=True).items()
    )
    saved = {n for stage in parts for n in stage.state_dict()}
    assert saved == (parameters.keys() | buffers.keys()) & module.state_dict().keys()
    order = list(parameters)
    for stage in parts:
        names = [n for n, _ in stage.named_parameters()]
        assert names == sorted(names, key=order.index)


@pytest.mark.parametrize("name", MODULES)
def test_on_meta_the_stages_are_the_same(name: str):
    """And compute the same once they have memory and values."""
    module, example = make(name)
    expected = step([copy.deepcopy(module)], example, False)
    empty, empty_example = make(name, "meta")
    parts = cut(trace(empty, empty_example), 3)
    assert all(p.is_meta for p in empty.parameters())
    real = cut(trace(module, example), 3)
    assert [(p.inputs, p.outputs, p.shared) for p in parts] == [(p.inputs, p.outputs, p.shared) for p in real]
    for part in parts:
        part.to_empty(device="cpu")
        for tensor_name, tensor in tensors_of(part).items():
            tensor.data.copy_(tensors_of(module)[tensor_name])
    assert near(expected, step(parts, example, True), 1e-12)


def test_operations_that_make_tensors_go_to_the_new_device():
    module, example = make("writes")
    (stage,) = cut(trace(module, example), 1)
    _replace_device(stage._program, torch.device("cpu"), torch.device("meta"))
    held = [t.to("meta") for t in (*map(tensors_of(module).__getitem__, stage._held), *stage._constants, *example)]
    assert all(t.is_meta for t in stage._program(*held))


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator to move a stage to")
@pytest.mark.parametrize("name", ["writes", "resnet", "gpt2"])
def test_stages_on_an_accelerator_are_the_module(name: str):
    """Within 1e-10: its kernels may add in another order from run to run."""
    module, example = make(name)
    device = torch.accelerator.current_accelerator()
    parts = cut(trace(copy.deepcopy(module), example), 3)
    for part in parts:
        part.to(device)
    example = tuple(x.to(device) for x in example)
    assert near(step([module.to(device)], example, False), step(parts, example, True), 1e-10)


def test_an_example_given_twice_is_two_inputs():
    module, (user, item) = make("two-tower")
    (stage,) = cut(trace(module, (user, user)), 1)
    assert near(module(user, item), stage(user, item), 0.0)


def best_by_trying(
    costs: list[float], crossing: list[float], stages: int, tolerance: float
) -> tuple[float, float] | None:
    """Fewest bytes and, for them, the dearest stage."""
    tried = []
    for inner in itertools.combinations(range(1, len(costs)), stages - 1):
        ends = (0, *inner, len(costs))
        sent = sum(crossing[i] for i in inner)
        if np.isfinite(sent):
            tried.append((sent, max(sum(costs[a:b]) for a, b in pairwise(ends))))
    least = min((dearest for _, dearest in tried), default=0.0)
    return min(((sent, dearest) for sent, dearest in tried if dearest <= least * (1 + tolerance)), default=None)


@st.composite
def lines(draw: st.DrawFn) -> tuple[list[float], list[float], int, float]:
    """Costs and bytes (whole numbers, so that sums are exact), stages, tolerance."""
    count = draw(st.integers(1, 9))
    costs = draw(st.lists(st.integers(0, 6).map(float), min_size=count, max_size=count))
    inner = st.one_of(st.integers(0, 5).map(float), st.just(np.inf))
    crossing = draw(st.lists(inner, min_size=count - 1, max_size=count - 1))
    return costs, [0.0, *crossing, 0.0], draw(st.integers(1, 5)), draw(st.sampled_from([0.0, 0.25, 1.0]))


def is_best(line: tuple[list[float], list[float], int, float]) -> bool:
    costs, crossing, stages, tolerance = line
    ends = best_ends(costs, crossing, stages, tolerance)
    expected = best_by_trying(*line)
    if ends is None or expected is None:
        return ends is expected
    assert (ends[0], ends[-1], len(ends)) == (0, len(costs), stages + 1)
    dearest = max(sum(costs[a:b]) for a, b in pairwise(ends))
    return (sum(crossing[i] for i in ends[1:-1]), dearest) == expected


@settings(max_examples=150, deadline=None)
@given(lines())
def test_the_cut_is_the_best_of_all(line: tuple[list[float], list[float], int, float]):
    assert is_best(line)


def test_a_cut_that_ignores_bytes_is_not_the_best(monkeypatch: pytest.MonkeyPatch):
    line = [1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 9.0, 3.0, 0.0], 2, 1.0
    assert is_best(line)
    best = partition._partition
    monkeypatch.setattr(partition, "_partition", lambda at, sent, *rest: best(at, 0 * sent, *rest))
    assert not is_best(line)


class Random(nn.Module):
    """Each layer takes the sum or the product of some earlier results, at widths of 1 to 3."""

    def __init__(self, wiring: list[tuple[list[int], int]]):
        super().__init__()
        self.wiring = wiring
        widths = [2]
        self.layers = nn.ModuleList()
        for sources, width in wiring:
            self.layers.append(nn.Linear(sum(widths[i] for i in sources), width))
            widths.append(width)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for layer, (sources, _) in zip(self.layers, self.wiring, strict=True):
            values.append(layer(torch.cat([values[i] for i in sources], -1)))
        return values[-1]


@st.composite
def wirings(draw: st.DrawFn) -> list[tuple[list[int], int]]:
    count = draw(st.integers(2, 5))
    return [
        (draw(st.lists(st.integers(0, i), min_size=1, max_size=3, unique=True)), draw(st.integers(1, 3)))
        for i in range(count)
    ]


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(wirings(), st.integers(2, 3), st.randoms())
def test_stages_of_random_graphs_send_the_fewest_bytes(wiring, stages, random):
    """Against all partitions, with bytes counted from who uses what."""
    graph = trace(Random(wiring), (torch.zeros(4, 2),))
    operations = [n for n in graph.program.graph.nodes if n.op == "call_function"]
    costs = {n.name: float(random.randint(0, 3)) for n in operations}
    values = [*graph.program.graph.find_nodes(op="placeholder"), *operations]

    def crossing(place: int) -> float:
        after = {*operations[place:], graph.program.graph.output_node()}
        before = [n for n in values if n not in operations[place:]]
        return float(sum(4 * n.meta["val"].numel() for n in before if after & n.users.keys()))

    found = cut(graph, stages, costs, tolerance=0.5)
    expected = best_by_trying(list(costs.values()), [crossing(i) for i in range(len(operations) + 1)], stages, 0.5)
    sent = sum(4 * size.numel() for stage in found[1:] for size, _ in stage.inputs)
    nodes = [[n for n in stage._program.graph.nodes if n.op == "call_function"] for stage in found]
    dearest = max(sum(costs[n.name] for n in part) for part in nodes)
    assert (sent, dearest) == expected
    assert all(a.outputs == b.inputs for a, b in pairwise(found))


def test_costs_are_those_of_the_roofline():
    class Known(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.conv = nn.Linear(256, 512), nn.Conv1d(2, 4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            q = self.linear(x).view(8, 4, 256, 128).transpose(1, 2).transpose(1, 2)
            y = F.scaled_dot_product_attention(q, q, q)
            return self.conv(y.flatten(1)[:, None].expand(8, 2, -1)).relu()

    costs = trace(Known(), (torch.zeros(8 * 256, 256),)).costs
    length = 4 * 256 * 128
    assert costs["linear"] == 2 * 8 * 256 * 256 * 512
    assert costs["view"] == costs["transpose"] == costs["expand"] == 0
    assert costs["scaled_dot_product_attention"] == 2 * (2 * 8 * 4 * 256 * 256 * 128)
    assert costs["relu"] == FLOPS_PER_BYTE * 4 * 2 * 8 * 4 * (length - 2)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # here
            return x
        return -x


class Shape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[torch.nonzero(x)[:, 0]]  # here


class Outside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.detach().numpy().sum())  # here


class Nested(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 4), Branch())


@pytest.mark.parametrize(
    ("module", "reason"),
    [(Branch, "depends on the values"), (Shape, "depends on the values"), (Outside, "numpy"), (Nested, "depends")],
)
def test_what_cannot_be_traced_is_refused_with_its_line(module: type, reason: str, capfd: pytest.CaptureFixture):
    lines = Path(__file__).read_text().splitlines()
    owner = Branch if module is Nested else module
    start = next(i for i, line in enumerate(lines) if line.startswith(f"class {owner.__name__}("))
    number = next(i for i, line in enumerate(lines[start:], start + 1) if line.endswith("# here"))
    with pytest.raises(LayoutError, match=reason) as error:
        trace(module(), (torch.ones(4, 4),))
    assert error.value.where == f"{__file__}:{number}"
    assert "layout fsdp=N needs no graph" in error.value.fix
    assert capfd.readouterr() == ("", "")


def test_a_tensor_whose_values_are_lost_on_meta_is_refused():
    with torch.device("meta"):
        module = nn.Linear(2, 2)
        module.scale = torch.tensor(2.0)
    with pytest.raises(LayoutError, match="`scale` is a plain tensor on meta"):
        trace(module, (torch.zeros(1, 2),))


class Cast(nn.Module):
    """All but its head in bfloat16, with a write in place and a result of several tensors."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for layer in self.layers:
                x = layer(x).relu_().softmax(-1)
            largest, _ = x.topk(8, -1)
        return self.head(largest.float())


@pytest.mark.parametrize("number", [2, 4])
def test_autocast_is_cut_inside(number: int):
    torch.manual_seed(0)
    module, x = Cast(), torch.randn(4, 8)
    stages = cut(trace(module, (x,)), number)
    values: Any = (x,)
    for stage in stages:
        values = stage(*(values if isinstance(values, tuple) else (values,)))
    expected = module(x)
    assert torch.equal(values, expected)
    assert any(dtype == torch.bfloat16 for stage in stages for _, dtype in stage.outputs)
    mine = torch.autograd.grad(values.sum(), list(module.parameters()))
    assert all(map(torch.equal, mine, torch.autograd.grad(expected.sum(), list(module.parameters()))))


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x, 2)  # this line fails


def test_a_module_that_fails_by_itself_is_told_so():
    with pytest.raises(LayoutError, match="Failing fails on the example, also without a graph: TypeError: ") as error:
        trace(Failing(), (torch.randn(3, 2),))
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "# this line fails" in text)
    assert error.value.where == f"{__file__}:{line}"
    assert error.value.fix == "module(*example) has to run by itself"


def test_where_nothing_can_be_cut_only_fsdp_is_offered():
    with pytest.raises(LayoutError, match="it has 0 places to cut") as error:
        cut(trace(nn.Linear(2, 2), (torch.randn(3, 2),)), 2)
    assert error.value.fix == "fsdp"


def test_too_many_stages_are_refused():
    graph: Graph = trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), (torch.zeros(1, 2),))
    with pytest.raises(LayoutError, match="1 places to cut"):
        cut(graph, 3)
