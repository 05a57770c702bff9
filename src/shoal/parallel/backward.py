"""Whether the stages of a traced module have its gradients: a graph records what forward does, not backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shoal.errors import LayoutError
from shoal.mesh import Mesh
from shoal.parallel.example import NEGLIGIBLE, Seen, blaming, same, take

_UNRECORDED = (
    "its forward has a backward of its own (torch.autograd.Function, a hook on a tensor, a reentrant "
    "torch.utils.checkpoint), which the graph of a pipeline does not have"
)


def refuse_unrecorded(
    module: nn.Module, stages: Sequence[nn.Module], example: tuple[Tensor, ...], written: Sequence[str], mesh: Mesh
) -> None:
    """LayoutError, the same on all ranks, where one stage after the other computes something else of the example than
    the module, forward or backward, in the mode in which it was traced and with the same random numbers.

    stages: with the module's own tensors. written: its buffers that forward writes, which stay as they are. Needs
    memory for the module's activations, and for its gradients twice.
    """
    layout = mesh.layout
    others = f"fsdp={layout.world} or replicas={layout.world}, which need no graph"

    def chained(*values: Any) -> Any:
        for stage in stages:
            values = stage(*values)
        return values

    parameters = dict(module.named_parameters())
    with _unchanged(module, written, example[0].device), blaming("the module fails", "its backward has to run alone"):
        whole = take(module, example, parameters)
    with _unchanged(module, written, example[0].device), blaming("the stages of the graph fail", others):
        mine = take(chained, example, parameters)
    # The ranks agree: one that goes on would wait for the others.
    wrong = int(mesh.largest(float(_first_wrong(whole, mine))))
    if wrong == 1:
        what = "the stages of the graph compute something else of the example than the module"
        raise LayoutError(what, where=f"layout {layout}", fix=others)
    if wrong:
        what = f"the gradient of '{list(parameters)[wrong - 2]}' is another in the stages of the graph: {_UNRECORDED}"
        raise LayoutError(what, where=f"layout {layout}", fix=f"{others}; of checkpoint: use_reentrant=False")


def _first_wrong(whole: Seen, mine: Seen) -> int:
    """0: nothing; 1: an output; 2 and more: the gradient of this parameter, in their order."""
    if len(whole.outputs) != len(mine.outputs) or not all(map(same, whole.outputs, mine.outputs)):
        return 1
    largest = max((float(g.abs().max()) for g in whole.gradients.values() if g.numel()), default=0.0)
    for place, (name, gradient) in enumerate(whole.gradients.items()):
        if not same(gradient, mine.gradients[name], NEGLIGIBLE * largest):
            return place + 2
    return 0


@contextmanager
def _unchanged(module: nn.Module, written: Sequence[str], device: torch.device) -> Iterator[None]:
    """Random state and written buffers are afterwards what they were: also where forward put another tensor in their
    place, or backward ran it again."""
    before: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
    for name in written:
        path, _, field = name.rpartition(".")
        buffer = module.get_buffer(name)
        before.append((module.get_submodule(path)._buffers, field, buffer, buffer.clone()))
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffers, field, buffer, value in before:
                    buffers[field] = buffer.copy_(value)
