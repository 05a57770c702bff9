"""One replica shared by the ranks of the fsdp axis, by PyTorch's `fully_shard`.

ZeRO stages (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models"):
1 shares the optimizer state: parameters are gathered once a step and gradients accumulate unsharded, reduced
once a step. 2 shares gradients too: one reduce-scatter a micro-batch. 3 shares parameters too: gathered for each
block's forward and again for its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from shoal.parallel.flat import Flat


class Sharded:
    """Wraps a model in place and steers what its backward passes send."""

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        mesh: DeviceMesh,
        zero: int,
        compute: torch.dtype | None,
        on_bucket: Callable[[Tensor, Flat], None] | None,
        stage: bool = False,
        experts: Sequence[nn.Module] = (),
        rest: DeviceMesh | None = None,
        in_order: bool = False,
    ):
        """compute: dtype in which blocks are gathered, None = their own. Reduction is in the parameters' own.

        stage: of a pipeline. Its parameters are gathered once a step whatever `zero` is: schedules that compute the
        gradients of inputs and of weights apart need them from one to the other, and torch's keep them in any case.

        on_bucket: called with each group's flat gradient piece, summed over this replica and the micro-batches, and
        with where what lies in it.

        experts: modules in the blocks that are shared by the ranks of `rest` only; if that is None, by nobody.

        in_order: every forward pass calls the blocks in their order.
        """
        self.zero = zero
        self.on_bucket = on_bucket
        self._last = True
        reduce = next(model.parameters()).dtype
        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
        reshard = zero == 3 and not stage
        alone = {p for module in experts for p in module.parameters()} if rest is None else set()
        if rest is not None:
            for module in experts:
                fully_shard(module, mesh=rest, mp_policy=policy, reshard_after_forward=reshard)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, ignored_params=alone)
        # The embedding and the output layer stay as stored, and autocast casts them where they are used: the sum of
        # a tied matrix's two gradients, and of the embedding's rows, would lose digits in bf16.
        own = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
        fully_shard(model, mesh=mesh, mp_policy=own, reshard_after_forward=False, ignored_params=alone)
        self.groups = [m for m in model.modules() if isinstance(m, FSDPModule)]
        self.flats: list[Flat] = []
        of_experts = {id(module) for module in experts}
        self._ranks = [rest.size() if rest and id(g) in of_experts else mesh.size() for g in self.groups]
        if mesh.device_type == "cpu":
            self._gather_ahead(in_order)
        self._sum: dict[int, Tensor] = {}
        for index, group in enumerate(self.groups):
            # Gradients are sums over tokens, divided once by the global count: nothing is averaged on the way.
            group.set_gradient_divide_factor(1.0)
            group.set_force_sum_reduction_for_comms(True)
            if on_bucket is not None:
                group.set_all_reduce_hook(self._reduced(index))

    def _gather_ahead(self, in_order: bool) -> None:
        """The next group's weights travel while one is computed.

        On a GPU streams see to that. On CPU `fully_shard` waits for every gather at once, unless told otherwise, and
        looks ahead in backward only. (It waits for reduce-scatters in any case: what comes out is used in the same
        call.)
        """
        for group in self.groups:
            group._set_unshard_async_op(True)
        if in_order:
            for group, following in pairwise(self.groups):
                group.set_modules_to_forward_prefetch([following])

    def _reduced(self, index: int) -> Callable[[Tensor], None]:
        """Adds the micro-batches' pieces up in the newest flat buffer and hands over the last one.

        `fully_shard` accumulates behind this hook, where a piece that is still being sent would be written to.
        So between micro-batches the gradients are taken away (see `backward`), and each buffer is its first.
        """

        def hook(flat: Tensor) -> None:
            earlier = self._sum.pop(index, None)
            if earlier is not None:
                flat.add_(earlier)
            if self._last:
                assert self.on_bucket is not None
                self.on_bucket(flat, self.flats[index])
            else:
                self._sum[index] = flat

        return hook

    @contextmanager
    def backward(self, last: bool) -> Iterator[None]:
        """What one micro-batch's forward and backward send; `last`: of the step."""
        self._last = last
        root = self.groups[0]
        root.set_is_last_backward(last)
        root.set_requires_gradient_sync(last or self.zero > 1)
        if self.zero < 3:
            # Parameters stay gathered until the step's last backward pass.
            root.set_reshard_after_backward(last)
        if self.on_bucket is not None and self.zero > 1:
            for parameter in self.parameters:
                parameter.grad = None
        yield

    def whole_step(self) -> None:
        """Before a pipeline's schedule, which by itself keeps gradients until the stage's last backward."""
        self._last = True

    def hold(self, parameters: list[nn.Parameter]) -> None:
        """The sharded parameters, once they have memory. `model.parameters()` are others while they are gathered."""
        self.parameters = parameters
        self.flats = [_flat(group, ranks) for group, ranks in zip(self.groups, self._ranks, strict=True)]


def _flat(group: nn.Module, ranks: int) -> Flat:
    """Where what this rank has of a group's parameters lies in what `fully_shard` hands over.

    Of each parameter, in the order in which it finds them: room for as many rows as any rank has.
    """
    places = []
    for parameter in dict.fromkeys(_own(group)):
        if isinstance(parameter, DTensor) and parameter.requires_grad:
            rows = -(-parameter.shape[0] // ranks)
            places.append((parameter, parameter.to_local().numel(), rows * parameter.shape[1:].numel()))
    return Flat(places)


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    """Of a group's module, those of its children first, but none of another group's."""
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _own(child)
    yield from module.parameters(recurse=False)


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


def rows_here(parameter: nn.Parameter, ranks: int, rank: int) -> tuple[Tensor, int]:
    """The rows of a sharded parameter that this one of `ranks` ranks has, and the index of the first one.

    (The parameter's own mesh would know, but PyTorch keeps meshes in caches, and after a new start in the same process
    it may be an equal one whose groups are gone.)
    """
    assert isinstance(parameter, DTensor)
    local = parameter.to_local().detach()
    # fully_shard cuts dimension 0 as torch.chunk does: equal pieces, the last ones shorter or empty.
    rows = -(-parameter.shape[0] // ranks)
    start = min(rows * rank, parameter.shape[0])
    assert local.shape[0] == min(rows, parameter.shape[0] - start), "fully_shard changed how it cuts parameters"
    return local, start


def local_gradient(parameter: Tensor) -> Tensor | None:
    """The gradient of this rank's piece."""
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
