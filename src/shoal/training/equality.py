"""A few steps of a job in one layout, with all that comes out written down; and how far two such records are apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from shoal.parallel.replica import Replica
from shoal.training.feed import micro_batches, on_device
from shoal.training.parts import Parts, assemble

_RECORDED = ("gradient", "weight")


def record(seat: Seat, *, job: str, prepared: str, folder: str, order: int = 0, halves: bool = False) -> dict[str, Any]:
    """Trains the job (TOML) for its steps and writes this rank's pieces of the first gradient and the last weights.

    order: shuffles the sequences of each step, another way for each number, as far as one rank reads them. halves: the
    matrices whose inputs two tensor ranks would share are multiplied in two halves, as these would.
    Returns losses and gradient norms of the steps, and the samples that this rank read in each.
    """
    what = parse(job)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=what.sync.timeout)
    try:
        corpus = Prepared.load(Path(prepared))
        loader = Loader(corpus, what.data, "train", what.train.global_batch, what.train.seed)
        parts = assemble(what, mesh)
        if halves:
            model = parts.replica.module
            assert isinstance(model, Decoder)
            _in_halves(model)
        return _steps(parts, loader, Path(folder), order)
    finally:
        mesh.close()


def _in_halves(model: Decoder) -> None:
    for name, module in model.named_modules():
        if split.how(name, model.options) == split.INPUTS and isinstance(module, nn.Linear):
            module.__dict__["forward"] = partial(_two_products, module)


def _two_products(module: nn.Linear, x_BLF: Tensor) -> Tensor:
    half = module.in_features // 2
    out_BLD = F.linear(x_BLF[..., :half], module.weight[:, :half])
    out_BLD = out_BLD + F.linear(x_BLF[..., half:], module.weight[:, half:])
    return out_BLD if module.bias is None else out_BLD + module.bias.to(out_BLD.dtype)


def _steps(parts: Parts, loader: Loader, folder: Path, order: int) -> dict[str, Any]:
    losses, norms, samples = [], [], []
    pieces: dict[str, Tensor] = {}
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
    batch = on_device(loader.batch(position, mesh.reader, mesh.layout.readers), mesh.device)
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

    Per kind, for the parameter that comes nearest to its bound or exceeds it most: difference relative to the norm of
    the whole tensor, its bound, its name. reordered: records of the same rank in other orders; the bound of a parameter
    is then 4 times the most that it moves between them. Without, it is `bounds`' of the kind. With them, weights are
    compared all together: after some steps of AdamW each single one has moved by chance.
    """
    whole = {kind: _whole(reference, kind) for kind in _RECORDED}
    worst = {}
    for kind in _RECORDED:
        bound = dict.fromkeys(whole[kind], bounds[kind])
        if reordered:
            moves = [_differences(other, kind, whole[kind]) for other in reordered]
            if kind == "weight":
                moves = [_together(move, whole[kind]) for move in moves]
            bound = {name: max(bounds[kind], 4 * max(move[name] for move in moves)) for name in moves[0]}
        differences = _differences(folder, kind, whole[kind])
        if bound.keys() != differences.keys():
            differences = _together(differences, whole[kind])
        name = max(differences, key=lambda name: differences[name] / bound[name])
        worst[kind] = {"difference": differences[name], "bound": bound[name], "name": name}
    return worst


def _whole(folder: str, kind: str) -> dict[str, Tensor]:
    return {name: piece.double() for name, _, piece in _read(folder, kind)}


def _differences(folder: str, kind: str, whole: dict[str, Tensor]) -> dict[str, float]:
    """Per parameter, of what the ranks hold together; infinite where no rank holds an element, where it is no number,
    or where two ranks' copies differ in a bit."""
    held = {name: torch.full_like(tensor, torch.nan) for name, tensor in whole.items()}
    unequal = set()
    for name, offsets, piece in _read(folder, kind):
        there = held[name][tuple(slice(o, o + n) for o, n in zip(offsets, piece.shape, strict=True))]
        if not torch.all(there.isnan() | (there == piece)):
            unequal.add(name)
        there.copy_(piece)
    found: dict[str, float] = {}
    for name, right in whole.items():
        difference = ((held[name] - right).norm() / right.norm().clamp(min=1e-300)).item()
        found[name] = math.inf if name in unequal or not math.isfinite(difference) else difference
    return found


def _together(differences: dict[str, float], whole: dict[str, Tensor]) -> dict[str, float]:
    """Of all parameters as one vector."""
    squares = {name: tensor.square().sum().item() for name, tensor in whole.items()}
    moved = sum(difference**2 * squares[name] for name, difference in differences.items())
    return {"all": (moved / sum(squares.values())) ** 0.5}


def _read(folder: str, kind: str) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    for path in sorted(Path(folder).glob("rank-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (no dict)
                this, _, name = key.split("/", 2)
                if this == kind:
                    name, _, offsets = name.partition("@")
                    yield name, tuple(int(o) for o in offsets.split(",")), file.get_tensor(key)
