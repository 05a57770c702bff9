"""Linear layers of a module that shoal does not know, shared by the ranks of the tensor axis as a plan says.

Shoeybi et al. 2019 ("Megatron-LM", section 3, arXiv:1909.08053), without sequence parallelism, as nothing is known of
the module's sequence: in front of a matrix that is cut by columns (of its transpose: by output features) the identity,
whose gradient is summed; after one that is cut by rows (by input features) a sum, whose gradient is the identity. What
is in no plan is computed by every rank of the axis.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import LayoutError
from shoal.parallel.tensor import Cut

COLUMNS = "columns"
"""A linear layer of which each rank computes some output features."""
ROWS = "rows"
"""A linear layer that takes what `COLUMNS` ones make; its output is summed over the ranks."""
SUMMED = "summed"
"""A module between the two whose parameters every rank has, and uses for its own features only, as a norm of heads."""
WHOLE = "whole"
"""As if nothing was said."""

# The words of Hugging Face's plans (transformers.integrations.tensor_parallel). Those that make a whole output of a
# split layer save memory but change nothing that is computed: they stay whole.
_HUGGING_FACE = {
    "colwise": COLUMNS,
    "rowwise": ROWS,
    "replicated_with_grad_allreduce": SUMMED,
    "colwise_gather_output": WHOLE,
    "colwise_rep": WHOLE,
    "embedding_rowwise": WHOLE,
    "embedding_colwise": WHOLE,
    "replicate": WHOLE,
}
_KNOWN = (COLUMNS, ROWS, SUMMED, WHOLE)


def split(module: nn.Module, plan: Mapping[str, str] | None, group: dist.ProcessGroup) -> dict[str, Cut]:
    """Replaces the planned layers' parameters by this rank's pieces; canonical name of every parameter, and
    of every other tensor that was cut -> its piece.

    plan: pattern of module names (`blocks.*.up`) -> `columns`, `rows`, `summed` (of parameters' names, too) or a word
    of Hugging Face's plans; the first pattern that matches counts. None: the module's own, as Hugging Face's have
    (`base_model_tp_plan`). What requires no gradient is cut as well, and is a buffer by now. LayoutError where there
    is no plan, where it does not fit the module, or where sizes do not divide.
    """
    ranks, rank = group.size(), group.rank()
    how = _how(module, plan, ranks)
    _check_heads(module, ranks)
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    places = Counter(id(t) for _, t in tensors)
    canonical = {id(t): name for name, t in reversed(tensors)}
    cuts = {n: Cut(tuple(p.shape), (0,) * p.ndim, counted=rank == 0) for n, p in module.named_parameters()}
    summed = tuple(f"{name}." if name else "" for name, kind in how.items() if kind == SUMMED)
    for key, cut in cuts.items():
        if f"{key}.".startswith(summed):
            cuts[key] = replace(cut, summed="tensor", everywhere=True)
    for name, part in list(module.named_modules()):
        kind = how.get(name, WHOLE)
        if kind not in (COLUMNS, ROWS):
            continue
        if not isinstance(part, nn.Linear):
            what = f"the plan cuts '{name}' by {kind}, which is a {type(part).__name__}"
            raise LayoutError(what, where=f"tensor={ranks}", fix="only torch.nn.Linear can be cut")
        if "weight" not in part._parameters | part._buffers:
            what = f"the plan cuts '{name}', whose weight is computed from others (weight_norm, a parametrization)"
            raise LayoutError(what, where=f"tensor={ranks}", fix=f"plan '{name}' as {WHOLE}; or fsdp={ranks}")
        if places[id(part.weight)] > 1:
            what = f"the plan cuts '{name}', whose matrix is tied to another layer's ('{canonical[id(part.weight)]}')"
            raise LayoutError(what, where=f"tensor={ranks}", fix=f"plan '{name}' as {WHOLE}")
        _cut(part, name, kind, group, cuts)
    return cuts


def _how(module: nn.Module, plan: Mapping[str, str] | None, ranks: int) -> dict[str, str]:
    """Name of each planned module -> COLUMNS, ROWS, SUMMED or WHOLE."""
    own = plan is None
    plan = getattr(module, "_tp_plan", None) if plan is None else plan
    if not plan:
        what = f"{type(module).__name__} does not say how its matrices can be shared"
        raise LayoutError(what, where=f"tensor={ranks}", fix="give a plan ({'blocks.*.up': 'columns', ...}), or fsdp")
    modules = dict(module.named_modules())
    names = [*modules, *(name for name, _ in module.named_parameters())]
    how: dict[str, str] = {}
    for pattern, word in plan.items():
        kind = word if word in _KNOWN else _HUGGING_FACE.get(word)
        found = [name for name in names if fnmatchcase(name, pattern)]
        if kind is None and (found or not own):
            what = f"the plan has '{word}' for '{pattern}', which is not built"
            raise LayoutError(what, where=f"tensor={ranks}", fix=f"{', '.join(_KNOWN)}; or fsdp={ranks}")
        if not found and not own:
            raise LayoutError(f"the plan's '{pattern}' is no module's name", where=f"tensor={ranks}", fix=_some(names))
        for name in found:
            how.setdefault(name, kind or WHOLE)
        if not own and kind in (COLUMNS, ROWS) and modules.keys().isdisjoint(found):
            what = f"the plan's '{pattern}' is a parameter, and {kind} is of layers"
            raise LayoutError(what, where=f"tensor={ranks}", fix=f"plan '{found[0].rpartition('.')[0]}' as {kind}")
    if not {COLUMNS, ROWS} & set(how.values()):
        raise LayoutError("the plan cuts no layer", where=f"tensor={ranks}", fix=f"fsdp={ranks} needs no plan")
    return how


def _some(names: list[str]) -> str:
    return "names are like " + ", ".join(f"'{name}'" for name in names[1:4])


def _check_heads(module: nn.Module, ranks: int) -> None:
    """What Hugging Face's modules say of their heads: these are reshaped by head size, so ranks need whole ones."""
    config: Any = getattr(module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = getattr(config, "num_attention_heads", None)
    keys = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(keys, int) or not (heads % ranks or keys % ranks):
        return
    fits = [str(n) for n in range(1, keys + 1) if heads % n == 0 and keys % n == 0]
    raise LayoutError(
        f"layout tensor={ranks} does not divide {heads} query heads and {keys} key and value heads",
        fix=f"tensor={' or '.join(fits)}; or fsdp={ranks}",
    )


def _cut(part: nn.Linear, name: str, kind: str, group: dist.ProcessGroup, cuts: dict[str, Cut]) -> None:
    dimension = 0 if kind == COLUMNS else 1
    ranks, rank, total = group.size(), group.rank(), part.weight.shape[dimension]
    if total % ranks:
        fits = [str(n) for n in range(2, ranks) if total % n == 0]
        what = f"layout tensor={ranks} does not divide the {total} features of '{name}'"
        raise LayoutError(what, fix=f"tensor={' or '.join(fits) or 1}, or fsdp={ranks}")
    first, size = rank * total // ranks, total // ranks
    for key in ("weight", "bias") if kind == COLUMNS else ("weight",):
        whole = getattr(part, key)
        if whole is None:
            continue
        local = whole.detach().narrow(dimension, first, size).clone()
        setattr(part, key, nn.Parameter(local) if isinstance(whole, nn.Parameter) else local)
        offsets = tuple(first if d == dimension else 0 for d in range(whole.ndim))
        cuts[f"{name}.{key}"] = Cut(tuple(whole.shape), offsets)
    if kind == COLUMNS:
        part.out_features = size
        _compute_as(part, lambda x: F.linear(_Spread.apply(x, group), part.weight, part.bias))
    else:
        part.in_features = size
        _compute_as(part, _ByRows(part, group))


def _compute_as(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
    """The module keeps its parameters, their names and its hooks."""
    module.__dict__["forward"] = forward


class _ByRows:
    """The bias is added once, after the sum."""

    def __init__(self, module: nn.Linear, group: dist.ProcessGroup):
        self.module, self.group = module, group

    def __call__(self, x: Tensor) -> Tensor:
        y = _Sum.apply(F.linear(x, self.module.weight), self.group)
        return y if self.module.bias is None else y + self.module.bias


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
