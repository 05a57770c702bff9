"""Ranks of the tests of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.models.moe import Experts
from shoal.parallel.context import Context
from shoal.parallel.expert import ExpertAxis, Rows
from shoal.training.flights import replaced
from shoal.training.parts import assemble
from tests.equivalence import cases

NUMBER, CHOICES, TOKENS = 6, 2, 9


def whole_layer() -> Experts:
    options = replace(cases.QWEN, num_experts=NUMBER, num_experts_per_tok=CHOICES)
    torch.manual_seed(0)
    layer = Experts(options).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


def tokens(rank: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one rank: rank 0 has none, rank 1 sends all to the first expert or to none."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    rows = 0 if rank == 0 else TOKENS + rank
    x_ND = torch.randn(rows, cases.QWEN.hidden_size, dtype=torch.float64, generator=generator)
    index_NK = torch.rand(rows, NUMBER + 1, generator=generator).argsort(1)[:, :CHOICES]
    if rank == 1:
        index_NK = torch.tensor([0, NUMBER]).expand(rows, CHOICES)
    weight_NK = torch.rand(rows, CHOICES, dtype=torch.float64, generator=generator)
    return x_ND, index_NK, weight_NK


def dispatch(seat: meshes.Seat, seed: int) -> dict[str, Any]:
    """This rank's outputs and gradients, with experts that lie on all ranks."""
    mesh = meshes.build(Layout(fsdp=seat.world, expert=seat.world), seat, timeout=60)
    try:
        layer = whole_layer()
        model = torch.nn.Module()
        model.experts = layer
        cuts, _ = ExpertAxis(mesh).split(model)
        x_ND, index_NK, weight_NK = tokens(mesh.rank, seed)
        x_ND.requires_grad_(), weight_NK.requires_grad_()
        y_ND = layer(x_ND, index_NK, weight_NK)
        (y_ND.sin() * (1 + mesh.rank)).sum().backward()
        gradients = {
            name: (cuts[f"experts.{name}"].offsets[0], p.grad.tolist()) for name, p in layer.named_parameters()
        }
        return {
            "y": y_ND.tolist(),
            "x": x_ND.grad.tolist(),
            "weight": weight_NK.grad.tolist(),
            "experts": gradients,
        }
    finally:
        mesh.close()


# What makes the host wait for a device: values read out of a tensor, or sizes that its values decide.
_ASKING = (
    "tolist", "item", "cpu", "numpy", "nonzero", "unique", "bincount", "repeat_interleave",
    "__bool__", "__int__", "__index__", "__float__",
)  # fmt: skip


@contextmanager
def counted() -> Iterator[list[str]]:
    """Which of them are called. (A TorchFunctionMode would not see a backward of ours.)"""
    calls: list[str] = []

    def noting(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if name != "repeat_interleave" or kwargs.get("output_size") is None:
                calls.append(name)
            return method(*args, **kwargs)

        return noted

    with ExitStack() as stack:
        for name in _ASKING:
            stack.enter_context(replaced(torch.Tensor, name, partial(noting, name)))
        yield calls


def asked(seat: meshes.Seat, seed: int, told: bool = True) -> tuple[list[str], list[str]]:
    """What asks the device for values in a layer's (forward, backward). told: the products are told their sizes."""
    mesh = meshes.build(Layout(fsdp=seat.world, expert=seat.world), seat, timeout=60)
    try:
        model = torch.nn.Module()
        model.experts = whole_layer()
        ExpertAxis(mesh).split(model)
        if not told:
            compute = model.experts.compute
            model.experts.__dict__["compute"] = lambda rows_MD, counts_E, _: compute(rows_MD, counts_E)
        x_ND, index_NK, weight_NK = tokens(mesh.rank, seed)
        with counted() as forward:
            y_ND = model.experts(x_ND.requires_grad_(), index_NK, weight_NK)
        with counted() as backward:
            y_ND.sum().backward()
        return forward, backward
    finally:
        mesh.close()


def rows(seat: meshes.Seat, layout: str, length: int) -> dict[str, Any]:
    """What a rank holds of rows, what they are put together to, and what it then takes of them."""
    what = Layout.parse(layout)
    mesh = meshes.build(what, seat, timeout=60)
    try:
        context = Context(mesh.group("context"), what.context_by) if what.context > 1 else None
        part = SimpleNamespace(part_of_sequence=lambda x: x.chunk(what.tensor, -1)[mesh.tensor])
        row = Rows(mesh, context, part if what.tensor > 1 else None)
        whole_BLX = torch.arange(2 * length * 3).view(2, length, 3)
        mine_BlX = whole_BLX if context is None else context.cut(whole_BLX)
        mine_BlX = mine_BlX.chunk(what.tensor, 1)[mesh.tensor]
        together_BLX = row.whole(mine_BlX)
        return {
            "whole": torch.equal(together_BLX, whole_BLX),
            "own": torch.equal(row.own(together_BLX), mine_BlX),
            "first": row.first,
            "positions": mine_BlX.shape[1],
        }
    finally:
        mesh.close()


def saved(seat: meshes.Seat, layout: str) -> list[tuple[str, list[int], list[int]]]:
    """What this rank saves: name, offsets, shape."""
    what = cases.job(layout, 2, model="deepseek")
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts = assemble(what, mesh)
        return [
            (s.name, list(s.offsets), list(s.local.shape))
            for s in (*parts.replica.held(), *parts.update.state())
            if s.owner
        ]
    finally:
        mesh.close()


def held_out(seat: meshes.Seat, layout: str, model: str) -> dict[str, Any]:
    """Loss sums of one batch in evaluation, this rank's part, and whether modules are in training mode again."""
    torch.set_num_threads(1)
    what = cases.job(layout, 2, model=model)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts = assemble(what, mesh)
        tally = parts.replica.evaluate(cases.rank_batches(parts.mesh, 0, 0), parts.objective)
        modules = [module for part in parts.replica.parts.values() for module in part.module.modules()]
        noted = [layer.take_usage() for layer in modules if hasattr(layer, "take_usage")]
        return {
            "loss": tally.loss_sum.item(),
            "weight": tally.weight.item(),
            "training": all(module.training for module in modules),
            "noted": [usage for usage in noted if usage is not None],
        }
    finally:
        mesh.close()


def used(seat: meshes.Seat, layout: str, model: str, steps: int, alone: bool = False) -> list[dict[str, float]]:
    """How experts were used in each step, as this rank tells it. alone: planted bug, nothing is summed over ranks."""
    torch.set_num_threads(1)
    what = cases.job(layout, steps, "sgd", model=model)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts = assemble(what, mesh)
        if alone:
            move = parts.replica._balance.move
            parts.replica._balance.move = lambda mesh, counting: move(mesh, None)
        found = []
        for step in range(steps):
            parts.sync.begin(step)
            parts.sync.end(parts.replica.gradients(cases.rank_batches(parts.mesh, step, 0), parts.objective))
            assert parts.replica.used is not None
            found.append(parts.replica.used.figures())
        return found
    finally:
        mesh.close()
