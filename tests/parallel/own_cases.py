"""The modules of the examples, trained by `shoal.parallelize` in ranks, and by plain PyTorch in one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
from examples import convnet, hf_module, two_tower
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils import _pytree as pytree

import shoal
from shoal.mesh import Seat
from shoal.parallel import foreign, linears, statistics
from shoal.parallel.replica import Replica
from shoal.parallel.tensor import Cut
from shoal.training import own

SAMPLES, MICRO_BATCH = 16, 4


def hugging_face() -> nn.Module:
    """Its own norms compute in float32 whatever the weights are, where a float64's last bit may become a float32's."""
    return _with_plain_norms(hf_module.model())


def norms_of_heads() -> nn.Module:
    """Qwen3: its plan has parameters that every rank uses for its own heads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=hf_module.VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=hf_module.LENGTH, initializer_range=0.1,
    )  # fmt: skip
    return _with_plain_norms(Qwen3ForCausalLM(config))


def _with_plain_norms(module: nn.Module) -> nn.Module:
    for name, part in list(module.named_modules()):
        if type(part).__name__.endswith("RMSNorm"):
            module.set_submodule(name, nn.RMSNorm(part.weight.shape[0], eps=part.variance_epsilon))
    return module


class Mixed(nn.Module):
    """A frozen layer, one that no operation uses, a scalar of state that is not saved, and three uses of one matrix."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(6, 6)  # a name that a stage of the graph has itself
        self.again, self.frozen, self.unused = nn.Linear(6, 6, bias=False), nn.Linear(6, 6), nn.Linear(3, 3)
        self.between = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.again.weight = self.shared.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("offset", torch.tensor(0.5), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        skip = x = self.shared(x).tanh()
        for index, layer in enumerate(self.between):
            x = self.frozen(layer(x)).tanh() + self.offset
            if index == 1:
                x = self.again(x)
        return {"out": x + skip @ self.shared.weight, "skip": skip}


class WeightNorm(nn.Module):
    """Weights that are computed from a length and a direction, in the new way and in the old one."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            self.blocks = nn.ModuleList(
                nn.Sequential(weight_norm(nn.Linear(6, 6)), nn.Tanh(), nn.utils.weight_norm(nn.Linear(6, 6)))
                for _ in range(3)
            )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = x
        for block in self.blocks:
            out = out + block(out)
        return {"out": out, "skip": x}


def _mixed_batch(step: int, samples: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, 6, generator=generator)
    return x, x.roll(1, 1).tanh()


def _mixed_loss(out: dict[str, Tensor], target: Tensor) -> Tensor:
    return (out["out"] - target).square().sum() + 0.1 * out["skip"].square().sum()


MODULES: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Any], own.Loss]] = {
    "convnet": (convnet.ConvNet, convnet.batch, convnet.loss),
    "two_tower": (two_tower.TwoTower, two_tower.batch, two_tower.loss),
    "hf_module": (hugging_face, hf_module.batch, hf_module.loss),
    "qwen3": (norms_of_heads, hf_module.batch, hf_module.loss),
    "mixed": (Mixed, _mixed_batch, _mixed_loss),
    "weight_norm": (WeightNorm, _mixed_batch, _mixed_loss),
}
PLANS = {"two_tower": two_tower.PLAN}


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODULES[name][0]().double()


def batch(name: str, step: int, samples: int = SAMPLES) -> Any:
    """A global batch, its floating-point numbers in float64."""
    made = MODULES[name][1](step, samples)
    return pytree.tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, made)


def inputs(name: str) -> tuple[Tensor, ...]:
    given, _ = batch(name, 0)
    return tuple(x[:MICRO_BATCH] for x in ((given,) if isinstance(given, Tensor) else given))


def options(optimizer: str) -> dict[str, Any]:
    return {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9} if optimizer == "sgd" else {"lr": 1e-2}


def start(seat: Seat, name: str, layout: str, optimizer: str = "sgd") -> own.Trained:
    torch.set_num_threads(1)
    return shoal.parallelize(
        build(name), f"{layout},micro_batch={MICRO_BATCH}", PLANS.get(name), example=inputs(name),
        loss=MODULES[name][2], seat=seat, **options(optimizer),
    )  # fmt: skip


def _values(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in state.items()}


def take_steps(trained: own.Trained, name: str, steps: range, samples: int = SAMPLES) -> dict[str, Any]:
    losses, norms, gradients = [], [], []
    for step in steps:
        done = trained.step(trained.share(batch(name, step, samples)))
        assert done.applied
        losses.append(done.loss)
        norms.append(done.gradient_norm)
        if step == 0:
            shards = trained.replica.shards()
            gradients = [(s.name, s.offsets, s.grad.tolist()) for s in shards if s.grad is not None]
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": _values(trained.state_dict())}


def run(
    seat: Seat, name: str, layout: str, steps: int, optimizer: str = "sgd", bug: str = "", samples: int = SAMPLES
) -> dict[str, Any]:
    with planted(bug), start(seat, name, layout, optimizer) as trained:
        result = take_steps(trained, name, range(steps), samples)
        # In a pipeline its batch norms, traced in training mode, cannot be evaluated.
        if name != "convnet" or trained.mesh.layout.pipeline == 1:
            result["held_out"] = trained.evaluate(trained.share(batch(name, 99, samples)))
        return result


def _twice(collect: Any) -> Any:
    def collect_twice(self: Any) -> Any:
        collect(self)
        return collect(self)

    return collect_twice


def _quarter(call: Any) -> Any:
    def mean(self: Any, module: Any, micro_batch: Any, handed: Any = None) -> Any:
        out, weight = call(self, module, micro_batch, handed)
        return (out / MICRO_BATCH if module is self.last else out), weight

    return mean


def _counted(shape: tuple[int, ...], offsets: tuple[int, ...], counted: bool = True) -> Cut:
    return Cut(shape, offsets)


def planted(bug: str) -> AbstractContextManager[Any]:
    """What is wrong for as long as it lasts; empty: nothing."""
    patch = mock.patch.object
    bugs = {
        "": nullcontext,
        "tied gradients added twice": lambda: patch(foreign.Tied, "collect", _twice(foreign.Tied.collect)),
        "tied gradients not added": lambda: patch(foreign.Tied, "collect", Replica.collect),
        "tied parameters counted in every stage": lambda: patch(foreign, "Cut", _counted),
        "mean instead of sum": lambda: patch(own.Objective, "__call__", _quarter(own.Objective.__call__)),
        "statistics of the first rank": lambda: patch(statistics.RunningStatistics, "end", lambda self, count: None),
        "no sum behind rows": lambda: patch(linears._Sum, "forward", lambda ctx, x, group: x * 1),
        "gradient in front of columns not summed": lambda: patch(
            linears._Spread, "backward", lambda ctx, gradient: (gradient, None)
        ),
    }
    return bugs[bug]()


def reference(name: str, steps: int, optimizer: str = "sgd", samples: int = SAMPLES) -> dict[str, Any]:
    """With nothing of shoal's: the loss of each micro-batch, summed, and torch's own optimizers."""
    module = build(name)
    learned = {n: p for n, p in module.named_parameters() if p.requires_grad}
    matrices = [p for p in learned.values() if p.ndim > 1]
    rest = [p for p in learned.values() if p.ndim <= 1]
    chosen = (
        torch.optim.SGD([*matrices, *rest], lr=0.1, momentum=0.9)
        if optimizer == "sgd"
        else torch.optim.AdamW([*matrices, *rest], lr=1e-2, weight_decay=0.0)
    )
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        chosen.zero_grad()
        total, weight = _whole_loss(module, name, step, samples)
        (total / weight).backward()
        given = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in learned.items()}
        norms.append(torch.stack([g.norm() for g in given.values()]).norm().item())
        gradients = gradients or given
        chosen.step()
        losses.append((total / weight).item())
    weights = {n: t.detach().clone() for n, t in module.state_dict().items()}
    with torch.no_grad():
        total, weight = _whole_loss(module.eval(), name, 99, samples)
    return {
        "losses": losses, "norms": norms, "gradients": gradients, "weights": weights,
        "held_out": (total / weight).item(),
    }  # fmt: skip


def _whole_loss(module: nn.Module, name: str, step: int, samples: int) -> tuple[Tensor, float]:
    given, target = batch(name, step, samples)
    given = (given,) if isinstance(given, Tensor) else given
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for first in range(0, samples, MICRO_BATCH):
        rows = slice(first, first + MICRO_BATCH)
        value = MODULES[name][2](module(*(x[rows] for x in given)), target[rows])
        value, count = value if isinstance(value, tuple) else (value, MICRO_BATCH)
        total, weight = total + value, weight + count
    return total, weight


def save_then_load(seat: Seat, name: str, layout: str, folder: str, load: bool) -> dict[str, Any]:
    """Three steps and a checkpoint; or, from that, the next three."""
    with start(seat, name, layout, "adamw") as trained:
        if load:
            assert trained.load(folder) == 3
            return take_steps(trained, name, range(3, 6))
        result = take_steps(trained, name, range(3))
        return result | {"path": str(trained.save(folder))}


def refused(seat: Seat, what: str) -> str:
    """The sentence that a mistake gets."""
    torch.manual_seed(0 if what != "seed" else seat.member)
    module: nn.Module = two_tower.TwoTower()
    example: Any = tuple(x[:MICRO_BATCH] for x in two_tower.batch(0, SAMPLES)[0])
    layout, plan, options = "tensor=2", dict(two_tower.PLAN), {}
    if what == "seed":
        layout = "replicas=2"
    elif what == "heads":
        module, plan, layout = hf_module.model(), None, f"tensor={seat.world}"
        example = hf_module.batch(0, MICRO_BATCH)[0]
    elif what == "no plan":
        plan = None
    elif what == "no sum":
        plan = {"user_tower.0": "columns"}
    elif what == "computed weight":
        module, plan = WeightNorm(), {"blocks.*.0": "columns", "blocks.*.2": "rows"}
        example = (torch.randn(4, 6),)
    elif what == "norms":
        module, plan, layout, example = convnet.ConvNet(), None, "fsdp=2", None
    elif what == "scalar":
        module.scale, plan, layout = nn.Parameter(torch.tensor(1.0)), None, "fsdp=2"
    elif what == "dtypes":
        module.item_tower.double()
        plan, layout = None, "fsdp=2"
    elif what in ("few", "shape"):
        layout = "pipeline=2"
    elif what == "untraceable":
        module, plan, layout, example = Untraceable(), None, "pipeline=2", (torch.randn(4, 2),)
    try:
        with shoal.parallelize(
            module, layout, plan, example=example, loss=two_tower.loss, seat=seat, **options
        ) as trained:
            trained.step([two_tower.batch(0, MICRO_BATCH + (what == "shape"))])
    except shoal.ShoalError as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # this line
            x = -x
        return self.linear(x)[:, 0]
