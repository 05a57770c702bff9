"""`shoal.parallelize`: the public call for users' own modules, in the ranks that torchrun started or in one process."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal import device
from shoal.errors import DataError, JobError, LayoutError, ModelError
from shoal.job import Layout
from shoal.job.check import nearest
from shoal.job.optim import OptimOptions
from shoal.launch.excluded import of_as_many_ranks, refuse_excluded
from shoal.launch.torchrun import seat_from_environment
from shoal.launch.unfit import refuse_unfit
from shoal.mesh import Mesh, Seat, build
from shoal.parallel.foreign import divide
from shoal.parallel.statistics import loose, momenta, norms
from shoal.training.micro_batch import Loss, as_inputs
from shoal.training.own import Outline, Trained

# Nothing that was not asked for, where the defaults of shoal's recipes do something.
_PLAIN: dict[str, Any] = {
    "betas": (0.9, 0.999), "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0, "clip": 0.0,
}  # fmt: skip


def parallelize(
    module: nn.Module,
    layout: Layout | str,
    plan: Mapping[str, str] | None = None,
    *,
    loss: Loss | None = None,
    example: Tensor | tuple[Tensor, ...] | None = None,
    optimizer: str = "adamw",
    lr: float = 1e-3,
    steps: int = 0,
    seat: Seat | None = None,
    **options: Any,
) -> Trained:
    """Spreads any module over the ranks of this start and trains it, with the same answer in every layout.

    module: with its weights in memory, equal on all ranks (same seed, or loaded); it is used up. layout: e.g.
    `pipeline=2,fsdp=2`; its ranks are those that torchrun started, one where there is no launcher. plan: for tensor,
    pattern of module names -> `columns` or `rows`; None = the module's own, as Hugging Face's have. loss: (output,
    target) -> SUM over the samples; None = the module is only to compute. example: inputs of one micro-batch (values do
    not matter), for pipeline and tensor. optimizer: `adamw` or `sgd`; options: all others of
    `shoal.job.optim.OptimOptions`, without schedule, decay and clipping unless given. steps: length of the run, for
    schedules that depend on it. seat: for launchers of your own.

    Raises LayoutError where the layout does not fit module or ranks, ModelError for weights that cannot be trained,
    JobError for options. docs/own-models.md says what is computed and what is not.
    """
    layout = Layout.parse(layout) if isinstance(layout, str) else layout
    layout.validate()
    update = _update(optimizer, lr, steps, options)
    inputs = None if example is None else _inputs(example)
    refuse_unfit(module, layout)
    layout = _fitting(module, layout, inputs)
    moved = momenta(module) if layout.readers > 1 else {}
    seat = seat or seat_from_environment() or _alone()
    if seat.world != layout.world:
        raise LayoutError(
            f"layout {layout} is of {layout.world} ranks, and there are {seat.world}",
            fix=f"torchrun --nproc-per-node {layout.world} ...; or layout {of_as_many_ranks(layout, seat.world)}",
        )
    if dist.is_initialized():
        what = "this process has a process group already: init_process_group, or another parallelize, was called"
        raise LayoutError(what, fix="leave it to shoal; close() what parallelize returned before the next")
    frozen = _settle(module)
    mesh = build(layout, seat)
    try:
        _refuse_different(module, mesh)
        module.to(mesh.device)
        inputs = None if inputs is None else tuple(x.to(mesh.device) for x in inputs)
        like = {n: t.detach().to("meta") for n, t in (*module.named_parameters(), *module.named_buffers())}
        outline = Outline(like, _state_names(module), moved, frozen)
        return Trained(divide(module, mesh, plan, inputs), mesh, loss, update, steps, outline, inputs)
    except BaseException:
        mesh.close()
        raise


def _update(optimizer: str, lr: float, steps: int, options: dict[str, Any]) -> OptimOptions:
    known = [f.name for f in fields(OptimOptions) if f.name not in ("name", "lr")]
    for name in options:
        if name not in known:
            raise JobError(f"parallelize has no option '{name}'", fix=nearest(name, known))
    if optimizer == "muon":
        what = "muon is for matrices inside blocks, and nobody knows which of a module's parameters are such"
        raise JobError(what, fix="optimizer adamw or sgd, or a model of shoal's own")
    update = OptimOptions(name=optimizer, lr=lr, **(_PLAIN | options))
    update.validate()
    if not steps and (update.schedule != "constant" or 0 < update.warmup <= 1):
        raise JobError(
            f"schedule={update.schedule} with warmup={update.warmup} needs to know how long", fix="steps=1000"
        )
    return update


def _inputs(example: Any) -> tuple[Tensor, ...]:
    try:
        return as_inputs(example)
    except DataError as error:
        raise JobError(f"of the example, {error.what}", fix="example=(inputs of one micro-batch,)") from error


def _fitting(module: nn.Module, layout: Layout, example: tuple[Tensor, ...] | None) -> Layout:
    """The layout, with its micro-batch where the example says it. LayoutError where it does not fit such a module."""
    where = f"layout {layout}"
    refuse_excluded(layout)
    if example is None and (layout.pipeline > 1 or layout.tensor > 1):
        why = "to trace the module" if layout.pipeline > 1 else "to see that the plan changes nothing"
        raise LayoutError(f"an example is needed {why}", where=where, fix="example=(inputs of one micro-batch,)")
    if layout.pipeline > 1 and example is not None:
        rows = example[0].shape[0] if example[0].ndim else 0
        if not rows:
            what = "the example has no samples in dimension 0 of its first tensor"
            raise JobError(what, where=where, fix="example=(inputs of one micro-batch,)")
        if layout.micro_batch not in (0, rows):
            what = f"micro_batch={layout.micro_batch}, and the example has {rows} samples"
            raise LayoutError(what, where=where, fix=f"micro_batch={rows}, or another example")
        layout = replace(layout, micro_batch=rows)
    _refuse_loose_statistics(module, layout)
    return layout


def _refuse_loose_statistics(module: nn.Module, layout: Layout) -> None:
    found = norms(module)
    if found and layout.world > 1 and not layout.micro_batch:
        name, norm = found[0]
        raise loose(f"'{name}' ({type(norm).__name__})", layout)


def _alone() -> Seat:
    os.environ.update(device.loopback_environment())
    return Seat(0, 1, 0, 1, dist.HashStore())


def _settle(module: nn.Module) -> set[str]:
    """What is not trained becomes a buffer, and a Hugging Face module makes no cache. ModelError without weights.

    Returns the names of what is not trained.
    """
    names = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_meta:
            fix = "build the module with its weights in memory, and load them"
            raise ModelError("it is on meta, and has no values", where=f"'{name}'", fix=fix)
    frozen: dict[int, Tensor] = {}
    for part in module.modules():
        for key, parameter in list(part._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                del part._parameters[key]
                part.register_buffer(key, frozen.setdefault(id(parameter), parameter.detach()))
    if not any(True for _ in module.parameters()):
        raise ModelError(
            "no parameter of the module requires a gradient", fix="requires_grad_(True) where it is to learn"
        )
    config: Any = getattr(module, "config", None)
    if getattr(config, "use_cache", False):
        # What it would keep is for generating, and goes through the graph as outputs of every block.
        config.use_cache = False
    return names


def _refuse_different(module: nn.Module, mesh: Mesh) -> None:
    """LayoutError that names the first tensor that ranks were given with different values: a seed was forgotten."""
    if mesh.world == 1:
        return
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    shapes = zlib.crc32(repr([(n, tuple(t.shape), str(t.dtype)) for n, t in tensors.items()]).encode())
    if not _agree([shapes], mesh)[0]:
        what = "ranks were given modules with different parameters or shapes"
        raise LayoutError(what, fix="build the same module on every rank")
    same = _agree([zlib.crc32(_bytes(t)) for t in tensors.values()], mesh)
    for name, equal in zip(tensors, same, strict=True):
        if not equal:
            what = f"ranks were given different values of '{name}'"
            raise LayoutError(what, fix="torch.manual_seed(...) before the module is built, or load the same weights")


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _agree(numbers: list[int], mesh: Mesh) -> list[bool]:
    mine = torch.tensor(numbers, dtype=torch.int64, device=mesh.device)
    ends = torch.stack([mine, -mine])
    mesh.wait(dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=mesh.everyone, async_op=True))
    return (ends[0] == -ends[1]).tolist()


def _state_names(module: nn.Module) -> dict[str, str]:
    """Key of the module's state_dict -> canonical name, which is the first of a tied tensor's."""
    first = {id(t): name for name, t in (*module.named_buffers(), *module.named_parameters())}
    state = module.state_dict(keep_vars=True)
    return {key: first[id(tensor)] for key, tensor in state.items() if id(tensor) in first}
