"""What of a user's module `shoal.parallelize` refuses before it makes any group of ranks."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from shoal.errors import LayoutError, ModelError
from shoal.job import Layout


def refuse_unfit(module: nn.Module, layout: Layout) -> None:
    """ModelError for weights without shape and for sparse gradients, LayoutError for hooks that would be lost."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(tensor):
            what = "it has no shape before the first forward pass (a Lazy module)"
            raise ModelError(what, where=f"'{name}'", fix="run module(*example) once first")
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.sparse and part.weight.requires_grad:
            what = "its gradient is sparse, and shoal adds up dense ones"
            raise ModelError(what, where=f"'{name}' ({type(part).__name__})", fix="sparse=False")
    if layout.world > 1:
        _refuse_hooks(module, layout)


def _refuse_hooks(module: nn.Module, layout: Layout) -> None:
    """Of hooks on parameters: where ranks hold pieces or parts, parameters are made anew without them. What replicas
    have accumulated is a part of the gradient."""
    only_replicas = layout.world == layout.replicas
    for name, parameter in module.named_parameters():
        # Those of an earlier start with the same module are shoal's own, and do nothing any more.
        accumulated = [h for h in _hooks(parameter._post_accumulate_grad_hooks) if not _is_own(h)]
        if accumulated:
            what = f"'{name}' has a post-accumulate-grad hook, which would see what one rank has of the gradient"
            raise LayoutError(what, where=f"layout {layout}", fix="change the gradient by the loss, or by clip=...")
        if _hooks(parameter._backward_hooks) and not only_replicas:
            what = f"'{name}' has a hook, which is lost where ranks hold pieces of the module"
            raise LayoutError(what, where=f"layout {layout}", fix=f"replicas={layout.world}, or take the hook away")


def _hooks(registered: Any) -> list[Any]:
    return list((registered or {}).values())


def _is_own(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("shoal.")
