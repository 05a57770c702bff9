"""What a traced module does in training that evaluation would not do, or would do otherwise."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from shoal.parallel.example import evaluating, floating, layers_called, same
from shoal.parallel.graph import Graph


def of_training(graph: Graph) -> str:
    """What of it evaluation would not do, in words; empty: nothing that can be seen in the graph."""
    nodes = [n for part in graph.program.modules() if isinstance(part, fx.GraphModule) for n in part.graph.nodes]
    for node in nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        given = {a.name: value for a, value in zip(node.target._schema.arguments, node.args, strict=False)}
        given = {a.name: a.default_value for a in node.target._schema.arguments} | given | dict(node.kwargs)
        training = given.get("train", given.get("training", True))
        chance = next((given[key] for key in ("dropout_p", "dropout", "p") if key in given), 1.0)
        if torch.Tag.nondeterministic_seeded in node.target.tags and training and chance:
            return f"'{node.name}' draws random numbers"
        if "batch_norm" in node.target._opname and training:
            return f"'{node.name}' computes with the statistics of the micro-batch"
    written = written_buffers(graph)
    return f"'{written[0]}' is written" if written else ""


def written_buffers(graph: Graph) -> list[str]:
    """Canonical names of the module's buffers that the forward pass writes."""
    storages = {s for fact in graph.facts.values() for n in fact.written for s in graph.facts[n].storages}
    nodes = [n for n in graph.program.graph.find_nodes(op="get_attr") if str(n.target) in graph.names]
    names = [graph.names[str(n.target)] for n in nodes if not storages.isdisjoint(graph.facts[n].storages)]
    return [name for name in names if not isinstance(graph.held[name], nn.Parameter)]


@torch.no_grad()
def differs(module: nn.Module, example: tuple[Tensor, ...], written: list[str]) -> bool:
    """Whether evaluation makes something else of the example than training does. written: buffers that training writes,
    which stay as they are."""
    buffers = {name: module.get_buffer(name).clone() for name in written}
    device = example[0].device
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type), layers_called():
        trained = floating(torch.func.functional_call(module, buffers, example))
        try:
            with evaluating(module):
                evaluated = floating(module(*example))
        except Exception:
            return True
    return len(trained) != len(evaluated) or not all(map(same, trained, evaluated))
