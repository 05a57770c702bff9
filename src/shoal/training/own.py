"""Training of a module that shoal does not know: what `shoal.parallelize` returns."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager, nullcontext
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
from shoal.parallel.example import layers_called
from shoal.parallel.foreign import Division, Tied
from shoal.parallel.statistics import RunningStatistics, called_norm, loose
from shoal.parallel.tensor import Cut
from shoal.shard import Shard, State
from shoal.sync import AllReduce
from shoal.training.micro_batch import Batch, Loss, Objective, as_inputs, refuse_too_few, shared
from shoal.training.watch import Watch


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


@dataclass(frozen=True)
class Outline:
    """Of a module before it was divided.

    like: canonical name of each parameter and buffer -> a tensor on meta of its shape. names: key of the module's
    state_dict -> canonical name. momenta: of the running statistics. frozen: what requires no gradient.
    """

    like: Mapping[str, Tensor]
    names: Mapping[str, str]
    momenta: Mapping[str, float]
    frozen: AbstractSet[str]


def _forward(module: nn.Module, batch: Batch, handed: tuple[Tensor, ...] | None) -> Any:
    return module(*(batch[0] if handed is None else handed))


class Trained:
    """A module spread over ranks, with its optimizer. All methods are to be called on all ranks, as a collective is."""

    def __init__(
        self,
        division: Division,
        mesh: Mesh,
        loss: Loss | None,
        options: OptimOptions,
        steps: int,
        outline: Outline,
        example: tuple[Tensor, ...] | None,
    ):
        """loss: None where it is only to compute. example: inputs of a micro-batch, to which a pipeline is fixed."""
        self.mesh, self.steps_done = mesh, 0
        self._like, self._names, self._division = outline.like, outline.names, division
        self._example = [(x.shape, x.dtype) for x in example or ()]
        self.replica = Tied(division, mesh)
        self.update = Update(self.replica.shards(), options, steps)
        self.sync = AllReduce(mesh, options.clip)
        self.sync.attach(self.replica, self.update)
        modules = [part.module for part in division.parts.values()]
        self._watch = Watch(modules, mesh, outline.frozen | outline.momenta.keys())
        self._modes = {part: part.training for module in modules for part in module.modules()}
        self._statistics = RunningStatistics(dict(outline.momenta), modules, mesh)
        last = division.parts.get(mesh.layout.stage_count - 1)
        self._loss, self._last = loss, last.module if last else None
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
        return shared(batch, self.mesh.layout, self.reader)

    def step(self, batches: Sequence[Batch]) -> Step:
        """One update from this rank's micro-batches, equally many on every rank.

        LayoutError where a pipeline's schedule cannot run so few, or where a batch norm that the module calls as a
        function computes with statistics of other micro-batches than in another layout. JobError without a loss.
        """
        objective = Objective(self._loss, self._last)
        batches = self._ready(batches)
        refuse_too_few(len(batches), self.mesh.layout)
        self._statistics.begin()
        self.sync.begin(self.steps_done)
        with warnings.catch_warnings(), self._watch.step(), self._naming_bypassed():
            if self.mesh.layout.pipeline > 1:
                # No stage writes to what it hands on, view or not.
                warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
            tally = self.replica.gradients(batches, objective if self.steps_done else self._looking(objective))
        for parameter in (p for part in self._division.parts.values() for p in part.module.parameters()):
            # Not used this time.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        applied = self.sync.end(tally)
        self._statistics.end(len(batches))
        self.steps_done += 1
        loss = applied.loss_sum / applied.weight if applied.weight else float("nan")
        return Step(loss, applied.grad_norm, applied.lr, applied.applied)

    def _looking(self, objective: Objective) -> Any:
        """In the first step: the statistics of a micro-batch are looked for in what backward passes through."""
        layout = self.mesh.layout

        def compute(module: nn.Module, batch: Batch, handed: tuple[Tensor, ...] | None = None) -> tuple[Any, Tensor]:
            out, weight = objective(module, batch, handed)
            if layout.world > 1 and not layout.micro_batch and called_norm(out):
                raise loose("batch_norm, which the module calls,", layout)
            return out, weight

        return compute

    def evaluate(self, batches: Sequence[Batch], loss: Loss | None = None) -> float:
        """The loss over all ranks' micro-batches, divided by their weight, in evaluation mode. loss: another one.

        LayoutError where a pipeline's stages, which were traced for training, compute something else then. JobError
        without a loss.
        """
        objective = Objective(self._loss if loss is None else loss, self._last)
        with self._evaluating():
            tally = self.replica.evaluate(self._ready(batches), objective)
        total = torch.stack([tally.loss_sum, tally.weight])
        self.mesh.wait(dist.all_reduce(total, group=self.mesh.everyone, async_op=True))
        return (total[0] / total[1]).item()

    @torch.no_grad()
    def __call__(self, inputs: Tensor | tuple[Tensor, ...]) -> Any:
        """What the module makes of the inputs of one of this rank's micro-batches, in evaluation mode, without
        gradients. In a pipeline, None on ranks that do not hold its last stage. LayoutError as for `evaluate`."""
        batches = self._ready([(inputs, ())])
        with self._evaluating():
            if self.replica.pipeline is None:
                return self.replica.module(*batches[0][0])
            outputs = self.replica.pipeline.forward(batches, _forward, self._division.handed)
        return outputs[0] if outputs else None

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        layout, by_mode = self.mesh.layout, self._division.by_mode
        if by_mode:
            what = f"the stages of a pipeline were traced in training mode, and evaluation is something else: {by_mode}"
            raise LayoutError(what, where=f"layout {layout}", fix="load trained.state_dict() into a module")
        try:
            for part in self._modes:
                part.training = False
            with layers_called() if layout.tensor > 1 else nullcontext(), self._naming_bypassed():
                yield
        finally:
            for part, mode in self._modes.items():
                part.training = mode

    @contextmanager
    def _naming_bypassed(self) -> Iterator[None]:
        """Fsdp gathers a block's weights where the block is called; otherwise they are pieces, and operations fail."""
        layout = self.mesh.layout
        try:
            yield
        except RuntimeError as error:
            if layout.sharers == 1 or "mixed torch.Tensor and DTensor" not in str(error):
                raise
            what = "weights of a repeated block are used where the block is not called, and fsdp has not gathered them"
            fix = f"call the block itself, block(x), and compute with its weights inside; or replicas={layout.world}"
            raise LayoutError(what, where=f"layout {layout}", fix=fix) from error

    def _ready(self, batches: Sequence[Batch]) -> list[Batch]:
        """On the device, with inputs that are a tuple, of the shapes that a pipeline knows."""
        if not batches:
            raise DataError(
                "a step needs at least one micro-batch", fix="trained.step(trained.share((inputs, target)))"
            )
        if self.mesh.layout.pipeline > 1 and torch.is_autocast_enabled(self.mesh.device.type):
            what = "torch.autocast is on around the pipeline, whose stages hand on the dtypes that were traced"
            raise LayoutError(what, where=f"layout {self.mesh.layout}", fix="enter it in the module's own forward")
        ready = []
        for inputs, target in batches:
            inputs = as_inputs(inputs)
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
        first = (self.mesh.fsdp, self.mesh.context) == (0, 0)
        saved = set(self._names.values())
        for stage, part in self._division.parts.items():
            for name, buffer in part.module.named_buffers():
                if name in saved:
                    # What requires no gradient may be cut, too.
                    cut = part.cuts.get(name)
                    whole = Cut(tuple(buffer.shape), (0,) * buffer.ndim, self.mesh.tensor == 0)
                    shape, offsets, counted = (
                        (cut or whole).global_shape,
                        (cut or whole).offsets,
                        (cut or whole).counted,
                    )
                    mine = first and counted and self._division.first[name] == stage
                    owner = mine and self.mesh.replica == 0
                    held.append(Shard(name, shape, offsets, buffer.detach(), owner=owner, counted=mine))
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
