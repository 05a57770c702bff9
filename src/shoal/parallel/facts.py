"""What each operation of a graph costs and writes to, seen by running it on fake tensors."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

# How many operations a device does in the time of moving one byte: accelerators have 100 to 300, a CPU about 10.
# Stages change little in between, as products then have far more operations per byte, and others far fewer.
FLOPS_PER_BYTE = 50.0

# They write running statistics, which their schemas do not say.
_SILENT_WRITERS = ("batch_norm", "instance_norm")


@dataclass(frozen=True)
class Fact:
    """What was seen when an operation ran on fake tensors.

    cost: in floating-point operations, by the roofline, see `graph.trace`. needs_gradient: whether backward passes
    through its result. storages: the memory in which its result lies. written: the nodes whose memory it writes to.
    """

    cost: float
    bytes: int
    needs_gradient: bool
    contiguous: bool
    storages: frozenset[int]
    written: frozenset[fx.Node]


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# The one kernel of attention for which FlopCounterMode has no formula.
_MORE_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class _Observer(fx.Interpreter):
    """Runs the program on fake tensors, all of which stay alive, so that memory tells which are views of which."""

    def __init__(self, program: fx.GraphModule):
        super().__init__(program, garbage_collect_values=False)
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = n.meta.get("val")
        if n.op in ("placeholder", "get_attr") and isinstance(value, Tensor):
            return value
        with FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS) as counter:
            value = super().run_node(n)
        self.flops[n] = counter.get_total_flops()
        return value

    def fact(self, node: fx.Node) -> Fact:
        """After all have run: a write in place may have changed whether a gradient is needed."""
        tensors = tensors_in(self.env[node])
        storages = frozenset(t.untyped_storage()._cdata for t in tensors)
        written = _written(node, self.module)
        inputs = [t for n in node.all_input_nodes for t in tensors_in(self.env[n])]
        is_view = storages <= {t.untyped_storage()._cdata for t in inputs} and not written
        moved = 0 if is_view or node.op != "call_function" else sum(map(_bytes, (*inputs, *tensors)))
        return Fact(
            cost=max(float(self.flops.get(node, 0)), FLOPS_PER_BYTE * moved),
            bytes=sum(map(_bytes, tensors)),
            needs_gradient=any(t.requires_grad for t in tensors),
            contiguous=all(t.is_contiguous() for t in tensors),
            storages=storages,
            written=written,
        )


def observe(program: fx.GraphModule) -> dict[fx.Node, Fact]:
    inputs = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    mode = next(
        (t.fake_mode for node in program.graph.nodes for t in tensors_in(node.meta.get("val"))), FakeTensorMode()
    )
    observer = _Observer(program)
    with mode, torch.enable_grad():
        observer.run(*inputs, enable_io_processing=False)
        return {node: observer.fact(node) for node in program.graph.nodes}


def tensors_in(value: Any) -> list[Any]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _written(node: fx.Node, program: Any) -> frozenset[fx.Node]:
    """The arguments whose memory `node` writes to."""
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        # A nested graph, as of `torch.no_grad()`: if anything in it writes, it may be to any argument.
        nested = (n for graph in nested_graphs(node, program) for n in graph.nodes)
        writes = any(_written(n, n.graph.owning_module) for n in nested)
        return frozenset(node.all_input_nodes if writes else ())
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is torch.ops.aten.detach_.default:
        return frozenset()
    if any(word in node.target._opname for word in _SILENT_WRITERS):
        return frozenset(n for n in node.all_input_nodes if n.op == "get_attr")
    arguments = node.target._schema.arguments
    values = [*zip(arguments, node.args, strict=False), *((a, node.kwargs.get(a.name)) for a in arguments)]
    written = [v for a, v in values if a.alias_info is not None and a.alias_info.is_write]
    return frozenset(n for n in pytree.tree_leaves(written) if isinstance(n, fx.Node))


def nested_graphs(node: fx.Node, program: fx.GraphModule) -> list[fx.Graph]:
    """The graphs that `node` takes as arguments, and theirs."""
    found = []
    for argument in node.all_input_nodes:
        inner = attrgetter(str(argument.target))(program) if argument.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            found += [inner.graph, *(g for n in inner.graph.nodes for g in nested_graphs(n, inner))]
    return found
