"""Known ways to get layouts wrong, planted one at a time: the equivalence suite must see each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import mesh as meshes
from shoal.models.moe import MoE
from shoal.models.spec import parameters
from shoal.models.storage import FusedLinear
from shoal.ops.initialise import initialise_
from shoal.parallel import ring
from shoal.parallel.pieces import sum_over
from shoal.parallel.replica import Tally
from shoal.parallel.ring import Ring
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases


def run(seat: meshes.Seat, bug: str, layout: str, steps: int, order: int = 0, **options: Any) -> dict[str, Any]:
    """bug: one of `plant`'s, "" = none."""
    torch.set_num_threads(1)
    # Clipping hides a scale, as it does in real jobs; without it the bug must show.
    what = cases.job(layout, steps, **options | {"optimizer": "sgd", "clip": 0.0})
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts = assemble(what, mesh)
        if bug:
            plant(parts, bug)
        return cases.take_steps(parts, steps, order)
    finally:
        mesh.close()


def results(ranks: Any, bug: str, row: cases.Row) -> list[dict[str, Any]]:
    """What every rank of `run` gives."""
    options = row.options | {"bug": bug}
    return ranks.run("tests.equivalence.bugs:run", cases.Layout.parse(row.layout).world, **options)


def reference(row: cases.Row) -> dict[str, Any]:
    options = row.options | {"clip": 0.0}
    del options["layout"]
    return cases.reference(**options)


def plant(parts: Parts, bug: str) -> None:
    """Only in these objects, which end with the run: the ranks' processes are used again."""
    objective, sync, replica = parts.objective, parts.sync, parts.replica
    sharded = replica._sharded[0] if replica._sharded else None
    if bug == "mean":  # of each micro-batch's tokens

        def mean(module, batch, hidden=None):
            loss_sum, weight = objective(module, batch, hidden)
            return loss_sum / weight, weight / weight

        parts.objective = mean
    elif bug == "scaled":  # by the number of ranks
        end = sync.end
        sync.end = lambda tally: end(Tally(tally.loss_sum, tally.weight / parts.mesh.world))
    elif bug == "alone":  # no all-reduce over replicas
        replica.on_bucket(lambda *_: None)
    elif bug == "bucket":  # one is not reduced
        sent: list[int] = []

        def skip_second(flat, place):
            sent.append(1)
            if len(sent) != 2:
                sync._send(flat, place)

        replica.on_bucket(skip_second)
    elif bug == "local":  # normalised by this rank's tokens
        end = sync.end

        def local(tally):
            before = tally.weight.clone()
            applied = end(tally)
            for shard in replica.shards():
                shard.grad.mul_(applied.weight / parts.mesh.world / before)
            return applied

        sync.end = local
    elif bug == "forgotten":  # all micro-batches but the last
        backward = replica._backward

        def forgets(last):
            # Where each ZeRO stage keeps what earlier micro-batches left: gathered, cut, or summed for the replicas.
            replica.module.zero_grad()
            for parameter in replica._parameters:
                parameter.grad = None
            if sharded is not None:
                sharded._sum.clear()
            return backward(last)

        replica._backward = forgets
    elif bug == "divided":  # reduce-scatter takes the mean, torch's default
        assert sharded is not None
        for group in sharded.groups:
            group.set_gradient_divide_factor(float(parts.mesh.layout.fsdp))
    elif bug == "unreduced":  # a block is cut, but not summed over the ranks
        assert sharded is not None
        sharded.groups[1].set_custom_reduce_scatter(_KeepOwn())
    elif bug == "misplaced":  # every rank takes its piece for the first one
        fills = parameters(parts.job.model)
        for s in replica.shards():
            first = (0,) * len(s.offsets)
            initialise_(s.local, s.name, s.global_shape, first, fills[s.name].fill, parts.job.train.seed)
    elif bug == "stale":  # gathered weights outlive the update: the first gradient is right, the second step is not
        assert sharded is not None
        gathers = sharded.backward

        @contextmanager
        def keeps(last):
            with gathers(last):
                sharded.groups[0].set_reshard_after_backward(False)
                yield

        sharded.backward = keeps
    elif bug == "own norm":  # not summed over the ranks of a replica
        parts.replica.mesh = copy.copy(parts.mesh)
        parts.replica.mesh.layout = replace(parts.mesh.layout, fsdp=1)
    elif bug in EXPERTS:
        plant_in_experts(parts, bug)
    else:
        plant_within_replica(parts, bug)


def plant_within_replica(parts: Parts, bug: str) -> None:
    """Of tensor, pipeline and context parallelism."""
    objective, replica = parts.objective, parts.replica
    context, tensors, pipeline = objective.context, objective.tensors, replica.pipeline
    if bug == "micro-batches averaged":  # torch's default
        assert pipeline is not None
        made = pipeline._schedule

        def averaging(*args):
            schedule, stages = made(*args)
            schedule.scale_grads = True
            return schedule, stages

        pipeline._schedule = averaging
    elif bug == "times the tensor degree":  # as if every rank's copy of the loss were another one

        def scaled(module, batch, hidden=None):
            loss_sum, weight = objective(module, batch, hidden)
            loss_sum.register_hook(lambda gradient: gradient * parts.mesh.layout.tensor)
            return loss_sum, weight

        parts.objective = scaled
    elif bug in ("norm weight not summed", "key heads not summed"):
        everywhere = bug == "norm weight not summed"
        for piece in replica._pieces:
            piece.cut = replace(piece.cut, summed=piece.cut.summed if piece.cut.everywhere != everywhere else "")
    elif bug in ("key heads counted twice", "tied gradient counted twice"):
        which = "k_proj" if bug.startswith("key") else "embed_tokens"
        for shard in replica.shards():
            shard.counted |= which in shard.name
    elif bug == "keys taken for values":  # stored in another order than computed
        for module in replica.module.modules():
            if isinstance(module, FusedLinear) and "k_proj" in module.names:
                module.__dict__["forward"] = _swapping(module)
    elif bug == "rows of a fused gradient off by one":
        for piece in replica._pieces:
            i = piece.index
            piece.index = slice(i.start - 1, i.stop - 1) if isinstance(i, slice) and i.start else i
    elif bug == "tied gradient added twice":
        once = replica._sum_shared
        replica._sum_shared = lambda pipeline: (once(pipeline), once(pipeline))
    elif bug == "ring off by one chunk":
        assert context is not None
        context.attend = lambda document_BL: lambda layer: _OffByOne(context.group, document_BL)
    elif bug in ("labels shifted on each rank", "positions of a whole row"):
        mine = objective._mine

        def local(batch):
            part = mine(batch)
            if bug == "labels shifted on each rank":
                return replace(part, labels_BL=part.tokens_BL.roll(-1, 1))
            return replace(part, position_BL=batch.position_BL[:, : part.tokens_BL.shape[1]])

        objective._mine = local
    elif bug == "dropout by rank":
        objective.seed += parts.mesh.rank
    elif bug == "dropout by local positions":
        objective.tensors = copy.copy(tensors)
        objective.tensors.part_of_sequence = lambda place_L: torch.arange(len(place_L) // tensors.ranks)
    elif bug == "heads numbered on each rank":
        objective.tensors = copy.copy(tensors)
        objective.tensors.options = replace(tensors.options, num_attention_heads=0)
    elif bug == "words not combined":
        tensors._combine = lambda sums: sums
    elif bug == "sequence gathered in another order":
        gather = tensors.whole_sequence
        tensors.whole_sequence = lambda hidden_BlD: gather(hidden_BlD).roll(hidden_BlD.shape[1], 1)
    else:
        raise AssertionError(bug)


def _swapping(fused: FusedLinear) -> Callable[[Tensor], tuple[Tensor, ...]]:
    right = fused.forward

    def wrong(x_BLD: Tensor) -> tuple[Tensor, ...]:
        q, k, v = right(x_BLD)
        return q, v, k

    return wrong


EXPERTS = (
    "balance loss of the row on each rank",
    "counts of one rank",
    "statistics of a rank's part of the row",
    "expert gradients summed twice",
    "expert gradients not summed",
    "router gradient not summed",
    "experts of the next rank",
)


def plant_in_experts(parts: Parts, bug: str) -> None:
    replica = parts.replica
    layers = [layer for layer in replica.module.modules() if isinstance(layer, MoE)]
    if bug == "balance loss of the row on each rank":
        for layer in layers:
            layer._watch = _without_scale(layer)
    elif bug == "counts of one rank":
        replica._balance.move = lambda *_: [layer.rebalance_(layer.take_usage().counts_E) for layer in layers]
    elif bug == "statistics of a rank's part of the row":
        for layer in layers:
            layer.row = None
    elif bug == "expert gradients summed twice":
        once = replica.collect
        replica.collect = lambda: (once(), sum_over("rest", replica._pieces, replica.mesh))[0]
    elif bug in ("expert gradients not summed", "router gradient not summed"):
        which = ".experts." if bug.startswith("expert") else ".gate."
        for piece in replica._pieces:
            piece.cut = replace(piece.cut, summed="" if which in piece.shard.name else piece.cut.summed)
    else:
        for layer in layers:
            layer.experts.__dict__["forward"] = _of_the_next_rank(layer, parts.mesh.layout.expert)


def _without_scale(layer: MoE) -> Callable[..., Tensor]:
    right = layer._watch

    def wrong(*given: Tensor) -> Tensor:
        # Rows that are whole have no scale; their choices have been counted by now.
        row, layer.row = layer.row, None
        try:
            return right(*given)
        finally:
            layer.row = row

    return wrong


def _of_the_next_rank(layer: MoE, ranks: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    right, experts = layer.experts.forward, layer.options.num_experts

    def wrong(x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
        next_NK = (index_NK + experts // ranks) % experts
        return right(x_ND, torch.where(index_NK < experts, next_NK, index_NK), weight_NK)

    return wrong


class _OffByOne(Ring):
    """Takes the keys of each chunk that arrives for those of the chunk before."""

    def __init__(self, group: dist.ProcessGroup, document_BL: Tensor):
        super().__init__(group, document_BL)
        tiles, visible, own = self.mask.tiles, self.mask.visible, ring.chunks(self.rank, self.ranks)

        def before(chunk: int) -> int:
            return chunk if chunk in own else max(chunk - 1, 0)

        self.mask.tiles = lambda queries, keys: tiles(queries, before(keys))
        self.mask.visible = lambda queries, keys, tile: visible(queries, before(keys), tile)


class _KeepOwn:
    """In place of a reduce-scatter: this rank's piece of its own gradient, without the others'."""

    def allocate(self, size, *, dtype, device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False) -> None:
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])
