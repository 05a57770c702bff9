"""Any module as a graph of tensor operations.

`torch.export` runs the module once on fake tensors and records its ATen operations, in the order in which they
ran. Nothing is decomposed or made functional, so the graph computes what the module computes, bit for bit.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from shoal.errors import LayoutError
from shoal.parallel.autocast import take_apart
from shoal.parallel.facts import Fact, observe, tensors_in


@dataclass(frozen=True)
class Graph:
    """A traced module. `program` has its operations in the order in which they ran; a get_attr is a tensor it holds.

    held: canonical name (the first one, as in `named_parameters`) -> the module's own parameter or buffer.
    names: target of a get_attr -> canonical name; what is not in it is a constant or a nested graph.
    passing: names of buffers that are not saved. device: where constants were made.
    """

    program: fx.GraphModule
    facts: dict[fx.Node, Fact]
    held: dict[str, Tensor]
    names: dict[str, str]
    passing: frozenset[str]
    result: pytree.TreeSpec
    device: torch.device

    @property
    def costs(self) -> dict[str, float]:
        """Name of each operation -> its estimated cost in floating-point operations."""
        return {node.name: fact.cost for node, fact in self.facts.items() if node.op == "call_function"}


def trace(module: nn.Module, example: tuple[Tensor, ...]) -> Graph:
    """The graph of module(*example).

    module: on any device, also meta. example: one micro-batch; its shapes are fixed in the graph, its values do not
    matter. The module's mode (`train`, `eval`) and every Python decision are fixed too. Costs are those of the
    forward pass by the roofline (Williams et al. 2009, "Roofline: an insightful visual performance model"):
    the larger of an operation's floating-point operations and FLOPS_PER_BYTE times the bytes it reads and writes;
    backward is taken as proportional. LayoutError, with the line of the module's code, if it cannot be traced.
    """
    _refuse_lost_values(module)
    tensors = dict(_named(module))
    device = next((t.device for t in (*tensors.values(), *example) if t.device.type != "meta"), torch.device("cpu"))
    with _off_meta(module, example, device) as inputs, _quiet():
        try:
            exported = torch.export.export(module, inputs, strict=False)
        except Exception as error:
            raise _why_not(module, inputs, error) from error
        program = exported.module(check_guards=False)
    assert isinstance(program, fx.GraphModule)
    for part in program.modules():
        if isinstance(part, fx.GraphModule):
            _tidy(part)
    take_apart(program)
    _refuse_varying_shapes(module, program)
    first = {id(t): name for name, t in reversed(tensors.items())}
    names = {name: first[id(t)] for name, t in tensors.items()}
    held = {name: t for name, t in tensors.items() if names[name] == name}
    result = exported.call_spec.out_spec
    passing = frozenset(held) - module.state_dict().keys()
    facts = observe(program)
    if _settle_writes(program, facts):
        facts = observe(program)
    return Graph(program, facts, held, names, passing, result, device)


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All names of all parameters and buffers: a tied one has several."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _refuse_lost_values(module: nn.Module) -> None:
    for name, part in module.named_modules():
        for field, value in vars(part).items():
            if isinstance(value, Tensor) and value.device.type == "meta":
                raise LayoutError(
                    f"`{field}` is a plain tensor on meta, so its values are lost",
                    where=f"{name or 'module'} ({type(part).__name__})",
                    fix=f"register_buffer('{field}', ...), or build the module on a device",
                )


@contextmanager
def _off_meta(module: nn.Module, example: tuple[Tensor, ...], device: torch.device) -> Iterator[tuple[Tensor, ...]]:
    """Puts fake tensors of `device` in the place of those on meta, for as long as it lasts.

    On meta itself `torch.tensor([1.0], device=x.device)` would record a constant without a value. An example
    that is given twice is made two, since export would take both for one input.
    """
    fakes: dict[int, Tensor] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def off_meta(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return tensor
        if id(tensor) not in fakes:
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        return fakes[id(tensor)]

    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (values, field, tensor)
        for part in module.modules()
        for values in (part._parameters, part._buffers)
        for field, tensor in values.items()
        if tensor is not None
    ]
    again = [any(x is y for y in example[:i]) for i, x in enumerate(example)]
    try:
        for values, field, tensor in places:
            values[field] = off_meta(tensor)
        yield tuple(off_meta(x.clone() if twice else x) for x, twice in zip(example, again, strict=True))
    finally:
        for values, field, tensor in places:
            values[field] = tensor


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch logs and prints about a failure, which we say in one sentence."""
    level, said = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(said):
            yield
        sys.stderr.write(said.getvalue())
    finally:
        logging.disable(level)


def _why_not(module: nn.Module, inputs: tuple[Tensor, ...], error: Exception) -> LayoutError:
    """The graph's fault, or the module's own, which fails on the example without any graph, too."""
    refusal = _refusal(module, str(error).strip() or type(error).__name__, _line(module, error))
    if not any(isinstance(t, FakeTensor) for t in (*inputs, *module.parameters(), *module.buffers())):
        try:
            with torch.no_grad():
                module(*inputs)
        except Exception as own:
            said = f"{type(own).__name__}: {str(own).strip().partition(chr(10))[0]}"
            return LayoutError(
                f"{type(module).__name__} fails on the example, also without a graph: {said}",
                where=_line(module, own),
                fix="module(*example) has to run by itself",
            )
    return refusal


def _refusal(module: nn.Module, reason: str, where: str) -> LayoutError:
    what, fix = reason.splitlines()[0], "layout fsdp=N needs no graph"
    if "data-dependent" in reason.lower() or "aten._local_scalar_dense" in reason:
        what = "what it does depends on the values in a tensor"
        fix += "; or write that line with operations on tensors only, such as torch.where"
    return LayoutError(f"{type(module).__name__} cannot be traced: {what}", where=where, fix=fix)


def _refuse_varying_shapes(module: nn.Module, program: fx.GraphModule) -> None:
    for node in program.graph.nodes:
        if not all(isinstance(size, int) for t in tensors_in(node.meta.get("val")) for size in t.shape):
            frames = re.findall(r'File "(.+)", line (\d+)', node.meta.get("stack_trace") or "")
            where = next((f"{path}:{line}" for path, line in reversed(frames) if _is_users(Path(path))), str(node))
            raise _refusal(module, "data-dependent shape", where)


def _line(module: nn.Module, error: BaseException | None) -> str:
    """File and line of the innermost frame of the module's own code."""
    while error is not None:
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            if _is_users(Path(frame.filename)):
                return f"{frame.filename}:{frame.lineno}"
        error = error.__cause__ or error.__context__
    return type(module).__name__


def _is_users(path: Path) -> bool:
    """Whether a source file is neither torch's nor Python's own, nor this one."""
    paths = sysconfig.get_paths()
    if not path.exists() or path == Path(__file__) or path.is_relative_to(Path(torch.__file__).parent):
        return False
    return not path.is_relative_to(paths["stdlib"]) or path.is_relative_to(paths["purelib"])


def _tidy(program: fx.GraphModule) -> None:
    """Takes out export's checks of dtype and device: a stage may be moved, and its shapes are explicit anyway."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
    program.recompile()


def _settle_writes(program: fx.GraphModule, facts: dict[fx.Node, Fact]) -> bool:
    """Whether it changed how `self.buffer = value` is written back, which export does by a copy at the very end.

    The copy goes to where the value is ready, and what reads the buffer before gets a clone: backward would find
    it changed. After `self.buffer += value` there is nothing to copy.
    """
    graph, aten = program.graph, torch.ops.aten
    copies = [n for n in graph.find_nodes(op="call_function", target=aten.copy_.default) if not n.users]
    copies = [n for n in copies if n.args[0].op == "get_attr"]
    for copy in copies:
        buffer, value = copy.all_input_nodes
        if facts[buffer].storages == facts[value].storages:
            graph.erase_node(copy)
            continue
        first = next(n for n in graph.nodes if buffer in n.all_input_nodes)
        if first is not copy:
            with graph.inserting_before(first):
                old = graph.call_function(aten.clone.default, (buffer,))
            old.meta["val"] = buffer.meta["val"].clone()
            buffer.replace_all_uses_with(old, delete_user_cb=lambda n, kept=(old, copy): n not in kept)
        written = {n: [s for w in facts[n].written for s in facts[w].storages] for n in graph.nodes if n in facts}
        ready = [n for n in written if n is value or not facts[value].storages.isdisjoint(written[n])]
        ready[-1].append(copy)
    return bool(copies)
