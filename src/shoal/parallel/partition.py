"""Cuts the graph of a module into pipeline stages of about equal cost with the fewest bytes between them.

The operations stay in the order in which they ran, so a partition is a choice of places to cut. What is made
before a cut and used after it crosses it; a value that skips stages is passed on by each of them, so the bytes
of a cut do not depend on the other cuts, and dynamic programming finds the best choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from shoal.errors import LayoutError
from shoal.parallel.facts import nested_graphs
from shoal.parallel.graph import Graph

Signature = list[tuple[torch.Size, torch.dtype]]


class Stage(nn.Module):
    """One stage: takes the tensors that come from the one before, returns the tuple for the next.

    The first takes the module's own inputs, the last returns the module's own output. Parameters and buffers are
    the module's, under their names there. inputs, outputs: shape and dtype of each tensor for one micro-batch;
    input_gradients, output_gradients: whether a gradient comes back for it. shared: parameters that other stages
    hold too -> all stages that do; their gradients must be added up.
    """

    def __init__(
        self,
        program: fx.GraphModule,
        held: Sequence[str],
        constants: Sequence[Tensor],
        result: pytree.TreeSpec | None,
        device: torch.device,
    ):
        """program: takes the `held` tensors, the constants, then the inputs."""
        super().__init__()
        # Not a submodule: its tensors are arguments, so that sharding may replace those registered here.
        self._program: fx.GraphModule
        object.__setattr__(self, "_program", program)
        self._held, self._constants, self._result, self._device = held, constants, result, device
        self._places: dict[str, tuple[nn.Module, str]] = {}
        self.inputs: Signature = []
        self.outputs: Signature = []
        self.input_gradients: list[bool] = []
        self.output_gradients: list[bool] = []
        self.shared: dict[str, list[int]] = {}
        self._recomputes = False

    def forward(self, *values: Tensor) -> Any:
        again = self._recomputes and torch.is_grad_enabled()
        out = checkpoint(self._compute, *values, use_reentrant=False) if again else self._compute(*values)
        return out if self._result is None else pytree.tree_unflatten(out, self._result)

    def _compute(self, *values: Tensor) -> Any:
        # Past attribute lookup: the module may have a part whose name is an attribute of the stage.
        held = [nn.Module.__getattr__(owner, field) for owner, field in map(self._places.__getitem__, self._held)]
        return self._program(*held, *self._constants, *values)

    def recompute(self) -> None:
        """From now on only the inputs of a forward pass are kept, and backward runs it anew (Chen et al. 2016,
        "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174)."""
        self._recomputes = True

    def hold(self, name: str, tensor: Tensor, saved: bool) -> None:
        """Registers a parameter or buffer; saved: whether a buffer is part of the state_dict."""
        *path, field = name.split(".")
        owner: nn.Module = self
        for part in path:
            # Past `add_module`, which refuses names that the stage has itself, such as `inputs`.
            child = owner._modules.setdefault(part, nn.Module())
            assert child is not None
            owner = child
        self._places[name] = owner, field
        if isinstance(tensor, nn.Parameter):
            owner._parameters[field] = tensor
        else:
            owner._buffers[field] = tensor
            if not saved:
                owner._non_persistent_buffers_set.add(field)

    def _apply(self, fn: Any, recurse: bool = True) -> Stage:
        """Constants, and the operations that make tensors, go along when the stage is moved to another device."""
        super()._apply(fn, recurse)
        device = fn(torch.empty(0, device=self._device)).device
        if device != self._device and device.type != "meta":
            self._constants = [c.to(device) for c in self._constants]
            for module in self._program.modules():
                if isinstance(module, fx.GraphModule):
                    _replace_device(module, self._device, device)
            self._device = device
        return self


def _replace_device(program: fx.GraphModule, old: torch.device, new: torch.device) -> None:
    for node in program.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(lambda a: new if a == old else a, (node.args, node.kwargs))
    program.recompile()


def cut(graph: Graph, stages: int, costs: Mapping[str, float] | None = None, tolerance: float = 0.05) -> list[Stage]:
    """The graph in `stages` stages.

    costs: name of an operation -> its cost in any unit, None = `graph.costs`. Of all partitions whose dearest stage
    costs at most (1 + tolerance) times the least possible, the one that sends the fewest bytes forward; of those
    the one whose dearest stage is cheapest. LayoutError if the graph has too few places to cut.
    """
    line = _Line(graph)
    costs = graph.costs if costs is None else costs
    ends = best_ends([costs[n.name] for n in line.nodes], line.crossing_bytes(), stages, tolerance)
    if ends is None:
        places = sum(np.isfinite(line.crossing_bytes()[1:-1]))
        raise LayoutError(
            f"the graph cannot be cut into {stages} stages: it has {places} places to cut",
            where=f"pipeline={stages}",
            fix=f"pipeline={places + 1} or less, or fsdp" if places else "fsdp",
        )
    parts = [line.stage(start, end) for start, end in pairwise(ends)]
    return _hold_tensors(graph, parts)


def _hold_tensors(graph: Graph, parts: list[Stage]) -> list[Stage]:
    users = {name: [i for i, part in enumerate(parts) if name in part._held] for name in graph.held}
    for name, tensor in graph.held.items():
        # What no operation uses is still part of the module's state.
        for index in users[name] or [0]:
            parts[index].hold(name, tensor, saved=name not in graph.passing)
            if len(users[name]) > 1 and isinstance(tensor, nn.Parameter):
                parts[index].shared[name] = users[name]
    return parts


def best_ends(
    costs: Sequence[float], crossing: Sequence[float] | np.ndarray, stages: int, tolerance: float = 0.0
) -> list[int] | None:
    """Where the stages begin and end: stages + 1 places, the first 0, the last len(costs); None if there are none.

    crossing: bytes over each of the len(costs) + 1 places; infinite where no cut may be, 0 at both ends.
    """
    reached = np.concatenate([[0.0], np.cumsum(costs)])
    places = np.flatnonzero(np.isfinite(crossing))
    at, sent = reached[places], np.asarray(crossing, dtype=float)[places]
    if stages < 1 or len(places) <= stages:
        return None
    least = _partition(at, np.zeros_like(sent), stages, np.inf)[0]
    _, chosen = _partition(at, sent, stages, least * (1 + tolerance))
    return [int(places[i]) for i in chosen]


def _partition(at: np.ndarray, sent: np.ndarray, stages: int, limit: float) -> tuple[float, list[int]]:
    """The partition with the fewest bytes sent, then the cheapest dearest stage, none of which is above `limit`.

    at: cost of all operations before each place. Returns the cost of the dearest stage, and the places.
    """
    count = len(at)
    total, dearest = np.full(count, np.inf), np.full(count, np.inf)
    total[0] = dearest[0] = 0.0
    before = np.zeros((stages, count), dtype=int)
    for stage in range(stages):
        new_total, new_dearest = np.full(count, np.inf), np.full(count, np.inf)
        for end in range(stage + 1, count):
            piece = at[end] - at[:end]
            bytes_ = np.where(piece <= limit, total[:end] + sent[:end], np.inf)
            peak = np.where(bytes_ == bytes_.min(), np.maximum(dearest[:end], piece), np.inf)
            before[stage, end] = start = int(peak.argmin())
            new_total[end], new_dearest[end] = bytes_[start], peak[start]
        total, dearest = new_total, new_dearest
    chosen = [count - 1]
    for stage in reversed(range(stages)):
        chosen.append(int(before[stage, chosen[-1]]))
    return float(dearest[-1]), chosen[::-1]


class _Line:
    """The operations of a graph in a row: what crosses each place, and the stage between two of them.

    What depends on neither inputs, parameters nor chance (positions, masks, literals) is not in the row: each stage
    makes it anew, where otherwise it would be sent.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.all = list(graph.program.graph.nodes)
        self.inputs = [n for n in self.all if n.op == "placeholder"]
        self.output = self.all[-1]
        written = frozenset(n for fact in graph.facts.values() for n in fact.written)
        self._written = frozenset(s for n in written for s in graph.facts[n].storages)
        made: set[fx.Node] = set()
        for node in self.all:
            if node.op == "get_attr" or (node.op == "call_function" and self._is_made_anew(node, made)):
                made.add(node)
        self.made = made
        self.nodes = [n for n in self.all if n.op == "call_function" and n not in made]
        self.place = {n: i for i, n in enumerate(self.nodes)} | dict.fromkeys(self.inputs, -1)
        end = len(self.nodes)
        self.last = {n: max((self.place.get(u, end) for u in n.users), default=-1) for n in self.place}

    def _is_made_anew(self, node: fx.Node, made: set[fx.Node]) -> bool:
        fixed = all(self._is_fixed(n) if n.op == "get_attr" else n in made for n in node.all_input_nodes)
        nodes = [node, *(n for g in nested_graphs(node, self.graph.program) for n in g.nodes)]
        by_chance = any(torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()) for n in nodes)
        changes = self.graph.facts[node].storages & self._written
        return fixed and not by_chance and not changes

    def _is_fixed(self, node: fx.Node) -> bool:
        """Whether a get_attr is a tensor that neither training nor the forward pass changes, or a nested graph."""
        held = self.graph.held.get(self.graph.names.get(str(node.target), ""))
        return not isinstance(held, nn.Parameter) and not self.graph.facts[node].storages & self._written

    def crossing_bytes(self) -> np.ndarray:
        """Bytes over each place, infinite where it must not be cut."""
        end = len(self.nodes)
        change = np.zeros(end + 2)
        for node, place in self.place.items():
            if place < self.last[node]:
                change[place + 1] += self.graph.facts[node].bytes
                change[self.last[node] + 1] -= self.graph.facts[node].bytes
        crossing = np.cumsum(change)[: end + 1]
        for first, last in self._bonds():
            crossing[first + 1 : last + 1] = np.inf
        crossing[0] = crossing[end] = 0.0
        return crossing

    def _bonds(self) -> Iterator[tuple[int, int]]:
        """First and last place of what must stay in one stage.

        An operation with the users of its several results; memory from where it is made to the last write to it;
        a tensor of the module that is written, with all that reads it.
        """
        end, facts = len(self.nodes) - 1, self.graph.facts
        for node in self.nodes:
            if not isinstance(node.meta.get("val"), Tensor):
                yield self.place[node], min(self.last[node], end)
        for storage in self._written:
            views = [n for n in self.all if storage in facts[n].storages]
            touching = [n for n in self.nodes if any(storage in facts[w].storages for w in facts[n].written)]
            if any(n.op == "get_attr" for n in views):
                touching += [user for n in views for user in n.users]
            places = [self.place.get(n, end) for n in touching]
            made = [max(self.place[n], 0) for n in views if n in self.place]
            yield min(places + made), max(places)

    def _crossing(self, place: int) -> list[fx.Node]:
        return [n for n, made in self.place.items() if made < place <= self.last[n]] if place else self.inputs

    def stage(self, start: int, end: int) -> Stage:
        """The operations from `start` up to before `end`."""
        wanted = set(self.nodes[start:end])
        arrive, leave = self._crossing(start), self._crossing(end)
        result = None
        if end == len(self.nodes):
            result, leave = self.graph.result, []
            wanted.add(self.output)
        for node in reversed(self.all):
            if node in wanted:
                wanted.update(n for n in node.all_input_nodes if n in self.made)
        program, held, constants = self._program(wanted, arrive, leave)
        stage = Stage(program, held, constants, result, self.graph.device)
        stage.inputs, stage.outputs = (
            [(n.meta["val"].shape, n.meta["val"].dtype) for n in nodes] for nodes in (arrive, leave)
        )
        stage.input_gradients, stage.output_gradients = (
            [self.graph.facts[n].needs_gradient for n in nodes] for nodes in (arrive, leave)
        )
        return stage

    def _program(
        self, wanted: set[fx.Node], arrive: list[fx.Node], leave: list[fx.Node]
    ) -> tuple[fx.GraphModule, list[str], list[Tensor]]:
        """The wanted operations as a function of tensors held, constants and arriving tensors, in this order."""
        graph, program = fx.Graph(), self.graph.program
        values = {n: attrgetter(str(n.target))(program) for n in self.all if n in wanted and n.op == "get_attr"}
        nested = {str(n.target): deepcopy(v) for n, v in values.items() if isinstance(v, fx.GraphModule)}
        held = [n for n in values if n.target in self.graph.names]
        constants = [n for n in values if n not in held and n.target not in nested]
        new = {n: graph.placeholder(n.name) for n in (*held, *constants, *arrive)}
        for node in self.all:
            if node in wanted and node not in new and node is not self.output:
                new[node] = graph.node_copy(node, new.__getitem__)
        if self.output in wanted:
            graph.output(fx.map_arg(self.output.args[0], new.__getitem__))
        else:
            # What is sent must lie in memory as it is received.
            facts = self.graph.facts
            sent = (new[n] if facts[n].contiguous else graph.call_method("contiguous", (new[n],)) for n in leave)
            graph.output(tuple(sent))
        names = [self.graph.names[str(n.target)] for n in held]
        return fx.GraphModule(nested, graph), names, [values[n] for n in constants]
