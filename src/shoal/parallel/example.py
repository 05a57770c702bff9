"""What a module makes of an example, to see that nothing changes where nothing may: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shoal.errors import LayoutError
from shoal.parallel.tensor import Cut

# How far what a module computes may be from what its pieces on several ranks do, relative to its largest value.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}

# A gradient that is zero but for rounding is measured by this part of the module's largest.
NEGLIGIBLE = 1e-2

_PLAN = "see whether the plan cuts at whole heads, and every `columns` layer ends in a `rows` layer"


@dataclass
class Seen:
    """outputs: of floating-point numbers. gradients: canonical name of each parameter -> the gradient of a fixed
    pseudo-random projection of the outputs."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


@contextmanager
def layers_called() -> Iterator[None]:
    """Torch's transformer layers call their linear layers, the weights of which they else read in evaluation."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode, which draws no random numbers and moves no statistics."""
    modes = {part: part.training for part in module.modules()}
    try:
        for part in modes:
            # cuDNN computes gradients of recurrent layers in training only.
            part.training = part.training and isinstance(part, nn.RNNBase) and not part.dropout
        with layers_called():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def see(module: nn.Module, example: tuple[Tensor, ...], planned: bool = False) -> Seen:
    """What the module computes in evaluation mode. planned: whether it was split. LayoutError where it fails."""
    what = "split as planned, the module fails" if planned else "the module fails"
    fix = _PLAN if planned else "module(*example) and its backward have to run by themselves"
    with evaluating(module), blaming(what, fix):
        return take(module, example, dict(module.named_parameters()))


def take(compute: Callable[..., Any], example: tuple[Tensor, ...], parameters: Mapping[str, Tensor]) -> Seen:
    """compute(*example), and its gradients, in whatever mode it is. What is in `.grad` stays there."""
    before = {name: p.grad for name, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    try:
        with torch.enable_grad():
            outputs = floating(compute(*example))
            projections = [(leaf * _projection(leaf, seed)).sum() for leaf, seed in zip(outputs, count())]
            reached = [p for p in projections if p.requires_grad]
            # Not `autograd.grad`, with which a reentrant checkpoint does not work.
            if reached:
                torch.autograd.backward(reached)
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in parameters.items()}
    finally:
        for name, p in parameters.items():
            p.grad = before[name]
    return Seen([leaf.detach() for leaf in outputs], gradients)


@contextmanager
def blaming(what: str, fix: str) -> Iterator[None]:
    """LayoutError for whatever fails. what: what does, as in "the module fails"."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise LayoutError(f"{what} on the example: {said}", fix=fix) from error


def floating(out: Any) -> list[Tensor]:
    """The tensors of floating-point numbers in a nest of anything."""
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _projection(leaf: Tensor, seed: int) -> Tensor:
    return torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed)).to(leaf)


def compare(before: Seen, after: Seen, cuts: Mapping[str, Cut], group: dist.ProcessGroup) -> None:
    """LayoutError, the same on all ranks of the group, where the split module computes something else."""
    where = f"tensor={group.size()}"
    outputs = [same(*pair) for pair in zip(before.outputs, after.outputs, strict=True)]
    largest = max(float(g.abs().max()) for g in before.gradients.values() if g.numel())
    wrong = [not all(outputs)]
    for name, whole in before.gradients.items():
        cut, mine = cuts[name], after.gradients[name]
        if cut.summed:
            mine = mine.contiguous()
            dist.all_reduce(mine, group=group)
        here = tuple(slice(o, o + n) for o, n in zip(cut.offsets, mine.shape, strict=True))
        wrong.append(not same(whole[here], mine, NEGLIGIBLE * largest))
    said = torch.tensor(wrong, dtype=torch.int32, device=whole.device)
    dist.all_reduce(said, op=dist.ReduceOp.MAX, group=group)
    if said[0]:
        raise LayoutError("split as planned, the module computes something else", where=where, fix=_PLAN)
    names = [name for name, is_wrong in zip(before.gradients, said[1:].tolist(), strict=True) if is_wrong]
    whole_here = [name for name in names if after.gradients[name].shape == before.gradients[name].shape]
    if names:
        raise _wrong_gradient((whole_here or names)[0], bool(whole_here), cuts, where)


def same(whole: Tensor, mine: Tensor, floor: float = 0.0) -> bool:
    """Up to rounding. floor: added to the largest value, relative to which rounding is."""
    if whole.shape != mine.shape:
        return False
    if not whole.numel():
        return True
    bound = _ROUNDING.get(whole.dtype, 1e-1) * (float(whole.abs().max()) + floor)
    return float((whole - mine).abs().max()) <= bound


def _wrong_gradient(name: str, is_whole: bool, cuts: Mapping[str, Cut], where: str) -> LayoutError:
    what = f"split as planned, the gradient of '{name}' is another"
    if not is_whole:
        return LayoutError(what, where=where, fix=_PLAN)
    if cuts[name].summed:
        what, fix = f"{what}: every rank computes all of it", "leave it out of the plan"
    else:
        what, fix = f"{what}: '{name}' lies between columns and rows", "plan it as summed"
    return LayoutError(what, where=where, fix=f"{fix}; or {_PLAN}")
