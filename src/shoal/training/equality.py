"""A few steps of a job in one layout, with all that comes out written down; and how far two such records are apart."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from shoal import mesh as meshes
from shoal.data.batch import Batch
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.job import parse
from shoal.mesh import Mesh, Seat
from shoal.models import split
from shoal.models.decoder import Decoder
from shoal.models.storage import FusedLinear
from shoal.parallel.replica import Replica
from shoal.training.feed import micro_batches, step_batch
from shoal.training.parts import Parts, assemble

_RECORDED = ("gradient", "weight")


def record(seat: Seat, *, job: str, prepared: str, folder: str, order: int = 0, sums: int = 1) -> dict[str, Any]:
    """Trains the job (TOML) for its steps and writes this rank's pieces of the first gradient and the last weights.

    order: shuffles the sequences of each step, another way for each number, as far as one rank reads them. sums: what
    tensor ranks would sum, forward and backward, is summed of so many parts, as so many ranks would.
    Returns losses and gradient norms of the steps, and the samples that this rank read in each.
    """
    what = parse(job)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=what.sync.timeout)
    try:
        corpus = Prepared.load(Path(prepared))
        loader = Loader(corpus, what.data, "train", what.train.global_batch, what.train.seed)
        parts = assemble(what, mesh)
        if sums > 1:
            model = parts.replica.module
            assert isinstance(model, Decoder)
            _in_parts(model, sums)
        return _steps(parts, loader, Path(folder), order)
    finally:
        mesh.close()


def _in_parts(model: Decoder, sums: int) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            by_inputs = split.how(name, model.options) == split.INPUTS
            module.__dict__["forward"] = partial(_of_inputs if by_inputs else _of_outputs, module, sums)
        elif isinstance(module, FusedLinear):
            module.__dict__["forward"] = partial(_of_several, module, sums)


def _of_inputs(module: nn.Linear, sums: int, x_BLF: Tensor) -> Tensor:
    parts = zip(x_BLF.tensor_split(sums, -1), module.weight.tensor_split(sums, -1), strict=True)
    first, *others = (F.linear(x, weight) for x, weight in parts)
    out_BLD = sum(others, first)
    return out_BLD if module.bias is None else out_BLD + module.bias.to(out_BLD.dtype)


def _of_several(module: FusedLinear, sums: int, x_BLD: Tensor) -> tuple[Tensor, ...]:
    return _of_outputs(module, sums, x_BLD).split(module.sizes, -1)


def _of_outputs(module: nn.Linear | FusedLinear, sums: int, x_BLD: Tensor) -> Tensor:
    """Backward, the gradient of what goes in is a sum of parts."""
    out_BLF = torch.cat([F.linear(x_BLD, weight) for weight in module.weight.tensor_split(sums)], -1)
    return out_BLF if module.bias is None else out_BLF + module.bias.to(out_BLF.dtype)


def _steps(parts: Parts, loader: Loader, folder: Path, order: int) -> dict[str, Any]:
    losses, norms, samples = [], [], []
    # Of one process also where it began: how far it moved since is what its noise is small against.
    pieces = dict(_pieces(parts.replica, "start")) if parts.mesh.world == 1 else {}
    for step in range(parts.job.train.steps):
        batches = _batches(loader, parts.mesh, step * parts.job.train.global_batch, order)
        parts.objective.step = step
        parts.sync.begin(step)
        applied = parts.sync.end(parts.replica.gradients(batches, parts.objective))
        losses.append(applied.loss_sum / applied.weight if applied.weight else float("nan"))
        norms.append(applied.grad_norm)
        samples.append([sample for batch in batches for sample in batch.sample_B.tolist()])
        if step == 0:
            # The update has scaled them, by the same number on every rank: the norm says by which.
            pieces |= dict(_pieces(parts.replica, "gradient"))
        if not applied.applied:
            break
    pieces |= dict(_pieces(parts.replica, "weight"))
    save_file(pieces, folder / f"rank-{parts.mesh.rank}.safetensors")
    return {"losses": losses, "norms": norms, "samples": samples, "reader": parts.mesh.reader}


def _batches(loader: Loader, mesh: Mesh, position: int, order: int) -> list[Batch]:
    batch = step_batch(loader, mesh, position)
    assert batch is not None
    if order:
        shuffle = torch.randperm(len(batch.sample_B), generator=torch.Generator().manual_seed(order + position))
        batch = Batch(**{f.name: getattr(batch, f.name)[shuffle] for f in fields(Batch)})
    return micro_batches(batch, mesh.layout.micro_batch)


def _pieces(replica: Replica[Batch], what: str) -> Iterator[tuple[str, Tensor]]:
    """(what, number, name and offsets) -> copy of a piece. The number tells apart two copies on one rank."""
    for number, shard in enumerate(replica.held()):
        tensor = shard.grad if what == "gradient" else shard.local
        if tensor is not None and tensor.numel():
            yield (
                f"{what}/{number}/{shard.name}@{','.join(map(str, shard.offsets))}",
                tensor.detach().cpu().clone(),
            )


def compare(
    seat: Seat, *, folder: str, reference: str, reordered: list[str], bounds: dict[str, float]
) -> dict[str, Any]:
    """How far the pieces in `folder` are from the tensors of the one rank that wrote `reference`.

    Per kind, for the tensor that comes nearest to its bound or exceeds it most: difference relative to the norm of the
    whole tensor, its bound, its name, and as `flaw` why it is infinite, if it is. bounds: of each kind, in exact
    arithmetic. reordered: records of the same rank in other orders, where there is noise. A tensor's bound is then, if
    it is more, four times its noise; or of weights, `turned` in bounds times what training has changed in one element
    of it: AdamW divides each element's gradient by its own size, and where that is near 0 by chance, noise becomes a
    step. These ratios have tails so long that no few orders bound them.
    """
    worst = {}
    for kind in _RECORDED:
        whole = _whole(reference, kind)
        as_one = _layer if reordered else str
        differences, flaws = _differences(folder, kind, whole, as_one)
        bound = dict.fromkeys(differences, bounds[kind])
        if reordered:
            moves = [_differences(other, kind, whole, as_one)[0] for other in reordered]
            noise, step = _noise(moves, whole), dict.fromkeys(differences, 0.0)
            if kind == "weight":
                step = _of_an_element(_whole(reference, "start"), whole, as_one)
            bound = {n: max(bounds[kind], 4 * noise[n], bounds["turned"] * step[n]) for n in differences}
        name = max(differences, key=lambda name: differences[name] / bound[name])
        flaw = flaws.get(name, "")
        worst[kind] = {"difference": differences[name], "bound": bound[name], "name": name, "flaw": flaw}
    return worst


def _whole(folder: str, kind: str) -> dict[str, Tensor]:
    return {name: piece.double() for name, _, piece in _read(folder, kind)}


def _layer(name: str) -> str:
    """`…mlp.experts.3.up_proj.weight` -> `…mlp.experts.*.up_proj.weight`: in low precision a token may go to another
    expert than before, which moves one of them by no small amount, and all of a layer by little."""
    return re.sub(r"\.experts\.\d+\.", ".experts.*.", name)


def _noise(moves: list[dict[str, float]], whole: dict[str, Tensor]) -> dict[str, float]:
    """Per tensor, the most that any tensor of its shape moves between orders of the same sums.

    A few orders show little of what one small tensor, a norm's or a bias, may move by: that of all of its kind in all
    blocks shows more.
    """
    shapes = {_layer(name): tensor.shape for name, tensor in whole.items()}
    most: dict[torch.Size, float] = {}
    for name, shape in shapes.items():
        most[shape] = max(most.get(shape, 0.0), *(move[name] for move in moves))
    return {name: most[shape] for name, shape in shapes.items()}


def _of_an_element(
    start: dict[str, Tensor], whole: dict[str, Tensor], as_one: Callable[[str], str]
) -> dict[str, float]:
    """Per tensor, how far one element has moved since `start`, root mean square, relative to the norm of all."""
    moved = _relative({name: _apart(start[name], right) for name, right in whole.items()}, whole, as_one)
    number = Counter[str]()
    for name, right in whole.items():
        number[as_one(name)] += right.numel()
    return {name: distance / math.sqrt(number[name]) for name, distance in moved.items()}


def _differences(
    folder: str, kind: str, whole: dict[str, Tensor], as_one: Callable[[str], str] = str
) -> tuple[dict[str, float], dict[str, str]]:
    """Per tensor, of what the ranks hold together; infinite where there is a flaw; and the flaws, one for a name.

    as_one: the name under which tensors count as one, of the norm of all.
    """
    held, flaws = _held(folder, kind, whole)
    apart = {name: math.inf if name in flaws else _apart(held[name], right) for name, right in whole.items()}
    return _relative(apart, whole, as_one), {as_one(name): flaw for name, flaw in flaws.items()}


def _apart(one: Tensor, other: Tensor) -> float:
    """The square of their distance."""
    return (one - other).square().sum().item()


def _relative(squares: dict[str, float], whole: dict[str, Tensor], as_one: Callable[[str], str]) -> dict[str, float]:
    """Distances relative to the norms of the tensors, each or those of one name together."""
    moved, size = defaultdict[str, float](float), defaultdict[str, float](float)
    for name, right in whole.items():
        moved[as_one(name)] += squares[name]
        size[as_one(name)] += right.square().sum().item()
    return {name: math.sqrt(moved[name] / max(size[name], 1e-300)) for name in moved}


def _held(folder: str, kind: str, whole: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors that the ranks' pieces make, and what is wrong with some whatever their numbers are."""
    held = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items()}
    flaws: dict[str, str] = {}
    for name, offsets, piece in _read(folder, kind):
        there = held[name][tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))]
        if not piece.isfinite().all():
            flaws[name] = f"{kind} of {name}: not all of it are finite numbers"
        elif not torch.all(there.isnan() | (there == piece)):
            flaws[name] = f"{kind} of {name}: two ranks hold different copies"
        there.copy_(piece)
    for name, tensor in held.items():
        if name not in flaws and tensor.isnan().any():
            flaws[name] = f"{kind} of {name}: no rank holds all of it"
    return held, flaws


def _read(folder: str, kind: str) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    for path in sorted(Path(folder).glob("rank-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no dict)
                this, _, name = key.split("/", 2)
                if this == kind:
                    name, _, offsets = name.partition("@")
                    yield name, tuple(int(o) for o in offsets.split(",")), file.get_tensor(key)
