"""Regions of `torch.autocast` in a traced graph, taken apart so that the graph can be cut inside of them.

Export records a region as one operation that has a graph of its own. Autocast decides for each operation by itself
what it computes in, so a region is the same as its operations, each in a region.
"""

from __future__ import annotations

from operator import attrgetter, getitem
from typing import Any

import torch
from torch import fx

_REGION = torch.ops.higher_order.wrap_with_autocast


def take_apart(program: fx.GraphModule) -> None:
    """In place. A region that has other regions or nested graphs in it stays whole."""
    for node in program.graph.find_nodes(op="call_function", target=_REGION):
        inner = attrgetter(_body(node))(program)
        if all(n.op == "placeholder" or n.op == "output" or _is_plain(n) for n in inner.graph.nodes):
            _open(program, node, inner)
    program.recompile()


def _body(region: fx.Node) -> str:
    """The name of the graph that it runs."""
    body = region.args[4]
    assert isinstance(body, fx.Node), region.format_node()
    return str(body.target)


def _is_plain(node: fx.Node) -> bool:
    return node.op == "call_function" and not isinstance(node.target, torch._ops.HigherOrderOperator)


def _open(program: fx.GraphModule, region: fx.Node, inner: fx.GraphModule) -> None:
    graph, name = program.graph, _body(region)
    placeholders = inner.graph.find_nodes(op="placeholder")
    new: dict[fx.Node, Any] = dict(zip(placeholders, region.args[5:], strict=True))
    results: Any = ()
    with graph.inserting_before(region):
        for index, node in enumerate(inner.graph.nodes):
            if node.op == "output":
                results = fx.map_arg(node.args[0], new.__getitem__)
            elif node.target is getitem:
                new[node] = graph.node_copy(node, new.__getitem__)
            elif node.op == "call_function":
                program.add_submodule(f"{name}_{index}", _alone(node))
                one = graph.get_attr(f"{name}_{index}")
                operands = [new[n] for n in node.all_input_nodes]
                new[node] = graph.call_function(_REGION, (*region.args[:4], one, *operands))
                new[node].meta = dict(node.meta)
    for user in list(region.users):
        assert user.target is getitem, f"{user} takes all of a region's results"
        user.replace_all_uses_with(results[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(region)
    for node in graph.find_nodes(op="get_attr", target=name):
        graph.erase_node(node)
    program.delete_submodule(name)


def _alone(node: fx.Node) -> fx.GraphModule:
    """The operation as a function of the nodes that it takes."""
    graph = fx.Graph()
    given = {n: graph.placeholder(n.name) for n in node.all_input_nodes}
    for n, placeholder in given.items():
        placeholder.meta = dict(n.meta)
    graph.output(graph.node_copy(node, given.__getitem__))
    return fx.GraphModule({}, graph)
