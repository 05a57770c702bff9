"""Training of a module that shoal does not know: what `shoal.parallelize` returns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from shoal import checkpoint
from shoal.checkpoint.contents import find
from shoal.errors import CheckpointError, DataError, LayoutError
from shoal.job.optim import OptimOptions
from shoal.mesh import Mesh
from shoal.optim.update import Update
from shoal.parallel.foreign import Division, Tied
from shoal.parallel.statistics import RunningStatistics
from shoal.shard import Shard, State
from shoal.sync import AllReduce

Batch = tuple[Any, Any]
"""(inputs, target): the module is called with the inputs, a tensor or a tuple of tensors, and the loss with what comes
out and the target, any nest of tuples, lists and dicts of tensors. Dimension 0 of every tensor is the sample."""

Loss = Callable[[Any, Any], Tensor | tuple[Tensor, Tensor | float]]
"""(output, target) -> the loss SUMMED over the samples; or this and what it is to be divided by, also a sum, where
that is not the number of samples (tokens, say)."""


@dataclass(frozen=True)
class Step:
    """One step, the same on every rank.

    loss: over the global batch, divided by its weight. gradient_norm: of that loss, before clipping. applied: False
    where either was not finite: nothing was changed then.
    """

    loss: float
    gradient_norm: float
    learning_rate: float
    applied: bool


class Objective:
    """(module, micro-batch, what the stage before hands on) -> (loss, weight); an early stage: what it hands on."""

    def __init__(self, loss: Loss, last: nn.Module | None):
        """last: the module that makes the output; None where another rank has it."""
        self.loss, self.last = loss, last

    def __call__(self, module: nn.Module, batch: Batch, handed: tuple[Tensor, ...] | None = None) -> tuple[Any, Tensor]:
        inputs, target = batch
        out = module(*(inputs if handed is None else handed))
        weight: Tensor | float = inputs[0].shape[0]
        if module is self.last:
            out = self.loss(out, target)
            if isinstance(out, tuple):
                out, weight = out
            if not isinstance(out, Tensor) or out.ndim:
                what = f"shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
                raise DataError(f"the loss is no single number: {what}", fix="sum it over the samples: .sum()")
        return out, torch.as_tensor(weight, dtype=torch.float64, device=inputs[0].device)


def _rows(batch: Batch, start: int, count: int) -> Batch:
    return pytree.tree_map_only(Tensor, lambda x: x[start : start + count], batch)


class Trained:
    """A module spread over ranks, with its optimizer. All methods are to be called on all ranks, as a collective is."""

    def __init__(
        self,
        division: Division,
        mesh: Mesh,
        loss: Loss,
        options: OptimOptions,
        steps: int,
        like: Mapping[str, Tensor],
        names: Mapping[str, str],
        momenta: Mapping[str, float],
        example: tuple[Tensor, ...] | None,
        by_mode: bool,
    ):
        """like: canonical name -> a tensor on meta of its shape. names: key of the module's state_dict -> canonical
        name. momenta: of the running statistics. example: inputs of a micro-batch, to which a pipeline is fixed.
        by_mode: whether evaluation computes something else than training."""
        self.mesh, self.steps_done = mesh, 0
        self._like, self._names, self._division = like, names, division
        self._example = [(x.shape, x.dtype) for x in example or ()]
        self.replica = Tied(division, mesh)
        self.update = Update(self.replica.shards(), options, steps)
        self.sync = AllReduce(mesh, options.clip)
        self.sync.attach(self.replica, self.update)
        modules = [part.module for part in division.parts.values()]
        self._modes = {part: part.training for module in modules for part in module.modules()}
        self._statistics = RunningStatistics(dict(momenta), modules, mesh)
        last = division.parts.get(mesh.layout.stage_count - 1)
        self._objective = Objective(loss, last.module if last else None)
        self._by_mode = by_mode
        self._saver: checkpoint.Saver | None = None

    @property
    def rank(self) -> int:
        return self.mesh.rank

    @property
    def reader(self) -> int:
        """Which of the `readers` equal parts of the global batch this rank computes; several ranks may share one."""
        return self.mesh.reader

    @property
    def readers(self) -> int:
        return self.mesh.layout.readers

    def share(self, batch: Batch) -> list[Batch]:
        """This rank's micro-batches of the global batch, which all ranks give whole.

        DataError where the layout does not divide the samples evenly: ranks would count more or less than others.
        """
        layout, leaves = self.mesh.layout, [x for x in pytree.tree_leaves(batch) if isinstance(x, Tensor)]
        rows = {x.shape[0] if x.ndim else 0 for x in leaves}
        if len(rows) != 1:
            raise DataError(f"the batch's tensors have {sorted(rows)} rows", fix="dimension 0 of each is the sample")
        (total,) = rows
        size = layout.micro_batch or max(1, total // layout.readers)
        if not total or total % (layout.readers * size):
            unit = layout.readers * (layout.micro_batch or 1)
            raise DataError(
                f"layout {layout} does not divide a batch of {total} samples evenly",
                fix=f"a multiple of {unit}, such as {max(1, total // unit) * unit}; drop_last=True leaves out the rest",
            )
        part = total // layout.readers
        starts = range(part * self.reader, part * (self.reader + 1), size)
        return [_rows(batch, start, size) for start in starts]

    def step(self, batches: Sequence[Batch]) -> Step:
        """One update from this rank's micro-batches, equally many on every rank."""
        batches = self._ready(batches)
        self._statistics.begin()
        self.sync.begin(self.steps_done)
        with warnings.catch_warnings():
            if self.mesh.layout.pipeline > 1:
                # No stage writes to what it hands on, view or not.
                warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            tally = self.replica.gradients(batches, self._objective)
        for parameter in (p for part in self._division.parts.values() for p in part.module.parameters()):
            # Not used this time.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        applied = self.sync.end(tally)
        self._statistics.end(len(batches))
        self.steps_done += 1
        loss = applied.loss_sum / applied.weight if applied.weight else float("nan")
        return Step(loss, applied.grad_norm, applied.lr, applied.applied)

    def evaluate(self, batches: Sequence[Batch]) -> float:
        """The loss over all ranks' micro-batches, divided by their weight, in evaluation mode.

        LayoutError where a pipeline's stages, which were traced for training, compute something else then.
        """
        if self.mesh.layout.pipeline > 1 and self._by_mode:
            what = "the stages of a pipeline were traced in training mode, in which batch norm and dropout differ"
            raise LayoutError(what, where=f"layout {self.mesh.layout}", fix="load trained.state_dict() into a module")
        try:
            for part in self._modes:
                part.training = False
            tally = self.replica.evaluate(self._ready(batches), self._objective)
        finally:
            for part, mode in self._modes.items():
                part.training = mode
        total = torch.stack([tally.loss_sum, tally.weight])
        self.mesh.wait(dist.all_reduce(total, group=self.mesh.everyone, async_op=True))
        return (total[0] / total[1]).item()

    def _ready(self, batches: Sequence[Batch]) -> list[Batch]:
        """On the device, with inputs that are a tuple, of the shapes that a pipeline knows."""
        if not batches:
            raise DataError(
                "a step needs at least one micro-batch", fix="trained.step(trained.share((inputs, target)))"
            )
        ready = []
        for inputs, target in batches:
            inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
            shapes = [(x.shape, x.dtype) for x in inputs]
            if self.mesh.layout.pipeline > 1 and shapes != self._example:
                got, known = ([f"{list(shape)} {dtype}" for shape, dtype in x] for x in (shapes, self._example))
                raise DataError(f"a micro-batch's inputs are {got}, the example's were {known}", fix="drop_last=True")
            ready.append(pytree.tree_map_only(Tensor, lambda x: x.to(self.mesh.device), (inputs, target)))
        return ready

    def state_dict(self) -> dict[str, Tensor]:
        """What the module's own would be, in one process: whole tensors in every rank's memory, on the CPU."""
        pieces: dict[str, list[Shard]] = {}
        for shard in self._held():
            if shard.counted:
                pieces.setdefault(shard.name, []).append(shard)
        whole = {}
        for name in dict.fromkeys(self._names.values()):
            like = self._like[name]
            # Booleans cannot be added up.
            dtype = torch.uint8 if like.dtype == torch.bool else like.dtype
            tensor = torch.zeros(like.shape, dtype=dtype, device=self.mesh.device)
            for shard in pieces.get(name, ()):
                at = tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.local.shape, strict=True))
                tensor[at] = shard.local.to(dtype)
            if self.mesh.layout.ranks_per_replica > 1:
                self.mesh.wait(dist.all_reduce(tensor, group=self.mesh.within_replica, async_op=True))
            whole[name] = tensor.to("cpu", like.dtype)
        return {key: whole[name] for key, name in self._names.items()}

    def _held(self) -> list[Shard]:
        """Parameters and saved buffers; `counted` for the buffers, too, in one rank of each replica."""
        held = list(self.replica.shards())
        first = (self.mesh.fsdp, self.mesh.context, self.mesh.tensor) == (0, 0, 0)
        saved = set(self._names.values())
        for stage, part in self._division.parts.items():
            for name, buffer in part.module.named_buffers():
                if name in saved:
                    mine = first and self._division.first[name] == stage
                    shape = tuple(buffer.shape)
                    owner = mine and self.mesh.replica == 0
                    held.append(Shard(name, shape, (0,) * len(shape), buffer.detach(), owner=owner, counted=mine))
        return held

    def save(self, folder: str | Path, keep: int = 2) -> Path:
        """A checkpoint `folder/step-…`, which any layout can load, and returns its path; the newest `keep` stay.

        folder: on a file system that all ranks share. CheckpointError if it could not be written.
        """
        folder = Path(folder)
        if self._saver is None or self._saver.root != folder.absolute():
            if self._saver is not None:
                self._saver.close()
            nonce = torch.tensor([time.time_ns()], device=self.mesh.device)
            dist.broadcast(nonce, 0, group=self.mesh.everyone)
            self._saver = checkpoint.Saver(folder, self.rank, self.mesh.world, keep, nonce=f"{nonce.item():x}")
        values = {"update": self.update.values(), "steps": self.steps_done, "layout": str(self.mesh.layout)}
        pending = self._saver.save(State([*self._held(), *self.update.state()], values), self.steps_done)
        pending.wait()
        # Rank 0 has the last word: it waits for all parts.
        failed = self.mesh.largest(float(pending.error is not None))
        if failed:
            raise pending.error or CheckpointError(
                "another rank could not save", where=str(folder), fix="see its message"
            )
        return checkpoint.complete(folder)[0]

    def load(self, path: str | Path) -> int:
        """Goes on from a checkpoint of the same module (or the newest in a folder), of whatever layout, and returns
        the steps it had done. CheckpointError where it is damaged or of another module."""
        values = checkpoint.load(find(Path(path)), [*self._held(), *self.update.state()])
        self.update.restore(values["update"])
        self.steps_done = int(values["steps"])
        return self.steps_done

    def close(self) -> None:
        """Ends the groups of ranks, so that the process may make others."""
        if self._saver is not None:
            self._saver.close()
            self._saver = None
        self.mesh.close()

    def __enter__(self) -> Trained:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
