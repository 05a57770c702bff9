"""Ranks whose replicas train apart, and the same in one process with nothing of shoal's but the model."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch

from shoal import mesh as meshes
from shoal.data.batch import Batch
from shoal.job import Job, shares
from shoal.models import build
from shoal.models.spec import parameters
from shoal.observe.traffic import traffic
from shoal.ops.initialise import initialise_
from shoal.optim.schedule import learning_rate
from shoal.training.feed import micro_batches, step_batches
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases
from tests.models import experts
from tests.optim import reference as muon


def job(layout: str, steps: int, sync: dict[str, Any], **options: Any) -> Job:
    what = cases.job(layout, steps, **options)
    return replace(what, sync=replace(what.sync, **({"name": "local"} | sync))).validate()


def train(seat: meshes.Seat, layout: str, steps: int, sync: dict[str, Any], **options: Any) -> dict[str, Any]:
    """Every step's own figures, outer steps, and after each step the common weights and this replica's own."""
    torch.set_num_threads(1)
    what = job(layout, steps, sync, **options)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        return take_steps(assemble(what, mesh), steps)
    finally:
        mesh.close()


def take_steps(parts: Parts, steps: int, first: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = {"losses": [], "norms": [], "outer": {}, "common": [], "own": [], "tokens": []}
    told["replica"], position = parts.mesh.replica, first * cases.GLOBAL_BATCH
    for step in range(first, steps):
        parts.objective.step = step
        parts.sync.begin(step)
        taking = shares.taking(parts.job.sync, parts.mesh.layout.replicas, step)
        batches = step_batches(Stream(), parts.mesh, position, taking)
        position += shares.samples(parts.mesh.layout, parts.job.sync, cases.GLOBAL_BATCH, step)
        applied = parts.sync.end(parts.replica.gradients(batches, parts.objective))
        assert applied.applied
        if applied.weight:
            told["losses"].append(applied.loss_sum / applied.weight)
        told["norms"].append(applied.grad_norm)
        told["tokens"].append(applied.tokens)
        if applied.outer is not None:
            told["outer"][step + 1] = vars(applied.outer)
        told["common"].append([(s.name, s.offsets, s.local.tolist()) for s in parts.sync.alike()])
        told["own"].append([(s.name, s.offsets, s.local.tolist()) for s in parts.replica.held()])
    return told


class Stream:
    """Of the batches of all steps, one after the other, as a loader gives them."""

    global_batch = cases.GLOBAL_BATCH

    def stretch(self, position: int, count: int) -> Batch:
        return _stretch(position, count)

    def after(self, position: int, count: int) -> int:
        return position + count


@functools.cache
def _stretch(position: int, count: int) -> Batch:
    whole = cases.GLOBAL_BATCH
    steps = [cases.global_batch(step) for step in range(position // whole, (position + count - 1) // whole + 1)]
    first = position % whole
    return Batch(**{n: torch.cat([getattr(s, n) for s in steps])[first : first + count] for n in vars(steps[0])})


@functools.cache
def _data(step: int, replicas: int) -> list[Any]:
    return micro_batches(cases.global_batch(step), cases.GLOBAL_BATCH // replicas)


def reference(replicas: int, steps: int, sync: dict[str, Any], codec: str = "", **options: Any) -> dict[str, Any]:
    """The algorithm as its papers have it, in float64: every replica a model of its own with torch's own optimizers.

    codec: dtype to which what each has learned is rounded, and their sum. Returns the common weights after every step,
    each replica's losses, and its weights after the last one. Computed once: not to be written to.
    """
    return _once(replicas, steps, tuple(sync.items()), codec, tuple(options.items()))


@functools.cache
def _once(replicas: int, steps: int, sync: tuple[Any, ...], codec: str, options: tuple[Any, ...]) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other, ten times as long as they compute
    try:
        return _reference(replicas, steps, **dict(sync), codec=codec, **dict(options))
    finally:
        torch.set_num_threads(threads)


def _reference(
    replicas: int, steps: int, every: int, outer_lr: float, outer_momentum: float, fragments: int = 1, delay: int = 0,
    mix: float = 0.0, together: int = 0, codec: str = "", feedback: bool = True, share: tuple[int, ...] = (),
    pace: str = "", **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """together: that many steps at the start are one step on the mean gradient of all. share: of the batch, each
    replica's. pace: steps that each takes of as many as the largest number."""
    share = share or (1,) * replicas
    sizes = [cases.GLOBAL_BATCH * n // sum(share) for n in share]
    paces = [int(n) for n in pace.split("+")] if pace else [1] * replicas
    # Of what each has learned, in proportion to what it has learned from.
    parts = [size * n for size, n in zip(sizes, paces, strict=True)]
    counts, position = [replicas * n / sum(parts) for n in parts], 0
    what = cases.job("replicas=1", steps, **options)
    models = [_model(what) for _ in range(replicas)]
    inner = [_optimizer(what, model) for model in models]
    named = [{name: t.detach() for name, t in experts.canonical(model)} for model in models]
    common = {name: tensor.clone() for name, tensor in named[0].items()}
    # What moves by counts, not by gradients, is averaged.
    fixed = {name for name, _ in models[0].named_buffers() if name in common}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in common.items()}
    sent: dict[int, dict[str, Any]] = {}
    lost: dict[str, Any] = {}
    losses: list[list[float]] = [[] for _ in range(replicas)]
    history = []
    for step in range(steps):
        # Whoever takes n of N steps takes the last of each N / n.
        taking = [r for r, n in enumerate(paces) if step < together or (step + 1) * n % max(paces) < n]
        tokens = [torch.zeros(()) for _ in range(replicas)]
        for r in taking:
            batch = _stretch(position, sizes[r])
            position += sizes[r]
            tokens[r] = batch.weight_BL.double().sum()
            models[r].zero_grad()
            loss = cases._loss(what, models[r], batch, step)
            loss.backward()
            losses[r].append(loss.item() / tokens[r].item())
            for p in models[r].parameters():
                p.grad = (torch.zeros_like(p) if p.grad is None else p.grad) / tokens[r]
        if step < together:
            for group in zip(*(model.parameters() for model in models), strict=True):
                total = sum(p.grad * n for p, n in zip(group, tokens, strict=True)) / sum(tokens)
                for p in group:
                    p.grad = total.clone()
        for r in taking:
            _update(what, models[r], inner[r], step, steps)
        done = step + 1
        if done <= together:
            common = {name: tensor.clone() for name, tensor in named[0].items()}
            history.append({name: tensor.clone() for name, tensor in common.items()})
            continue
        for i in range(fragments):
            if _due(i, done + delay, every, fragments):
                sent[i] = {n: _send([c * (common[n] - m[n]) for c, m in zip(counts, named, strict=True)],
                                    lost.get(n), codec)
                           for n in common if _fragment(n, fragments) == i}  # fmt: skip
        settled = set()
        for i in range(fragments):
            if _due(i, done, every, fragments) and i in sent:
                settled.add(i)
                for n, (mean, left) in sent.pop(i).items():
                    lost[n] = left if feedback else None
                    velocity[n] = outer_momentum * velocity[n] + mean
                    common[n] = common[n] - (mean if n in fixed else outer_lr * (mean + outer_momentum * velocity[n]))
                    for m in named:
                        m[n].copy_((1 - mix) * common[n] + mix * m[n])
        if done == steps:
            for n in common:
                if _fragment(n, fragments) not in settled or mix:
                    moved = [c * (common[n] - m[n]) for c, m in zip(counts, named, strict=True)]
                    common[n] = common[n] - _send(moved, lost.get(n), "")[0]
                    for m in named:
                        m[n].copy_(common[n])
        history.append({name: tensor.clone() for name, tensor in common.items()})
    return {"losses": losses, "common": history, "own": named}


def _model(what: Job) -> torch.nn.Module:
    model = build(what.model).double()
    fills = parameters(what.model)
    for name, tensor in experts.canonical(model):
        initialise_(tensor.detach(), name, tuple(tensor.shape), (0,) * tensor.ndim, fills[name].fill, what.train.seed)
    return model


def _optimizer(what: Job, model: torch.nn.Module) -> Any:
    o = what.optim
    if o.name == "muon":
        return muon.OfModel(model, o)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if o.name == "adamw":
        return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, foreach=False)
    return torch.optim.SGD([{**g, "weight_decay": 0.0} for g in groups], lr=o.lr, momentum=o.momentum)


def _update(what: Job, model: torch.nn.Module, optimizer: Any, step: int, steps: int) -> None:
    o = what.optim
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    lr = learning_rate(o, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = lr
    for p in model.parameters():
        p.grad.mul_(min(1.0, o.clip / norm) if o.clip else 1.0)
        if o.name == "sgd" and p.ndim > 1:
            p.data.mul_(1 - lr * o.weight_decay)
    optimizer.step()
    cases.balance_(model)


def _due(fragment: int, done: int, every: int, fragments: int) -> bool:
    """Every fragment's turn comes once a round, the last one's at its end."""
    return done % every == (fragment + 1) * every // fragments % every and done > 0


def _fragment(name: str, fragments: int) -> int:
    parts = name.split(".")
    if "layers" in parts:
        return int(parts[parts.index("layers") + 1]) % fragments
    return 0 if "embed_tokens" in parts else fragments - 1


def _codec(tensor: torch.Tensor, codec: str) -> torch.Tensor:
    return tensor.to(getattr(torch, codec)).double() if codec else tensor


def _send(
    moved: list[torch.Tensor], lost: tuple[list[torch.Tensor], torch.Tensor] | None, codec: str
) -> tuple[torch.Tensor, tuple[list[torch.Tensor], torch.Tensor]]:
    """(mean of what arrives of each, what the codec loses of each and of their sum). lost: of the exchange before."""
    own, of_sum = lost or ([torch.zeros_like(m) for m in moved], torch.zeros_like(moved[0]))
    full = [m + e for m, e in zip(moved, own, strict=True)]
    arrived = [_codec(one, codec) for one in full]
    total = sum(arrived[1:], arrived[0].clone()) + of_sum
    told = _codec(total, codec)
    return told / len(moved), ([f - a for f, a in zip(full, arrived, strict=True)], total - told)


def agreement(seat: meshes.Seat, bucket_mib: float, steps: int, sync: dict[str, Any]) -> list[dict[str, Any]]:
    """In float32 after every step: the bits of the common weights, and of those of this replica's own."""
    torch.set_num_threads(1)
    what = job(f"replicas={seat.world},micro_batch=2", steps, sync, precision="fp32", model="even")
    what = replace(what, sync=replace(what.sync, bucket_mib=bucket_mib))
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts, told = assemble(what, mesh), []
        for step in range(steps):
            parts.objective.step = step
            parts.sync.begin(step)
            parts.sync.end(parts.replica.gradients(cases.rank_batches(mesh, step, 0), parts.objective))
            told.append({"common": _bits(parts.sync.alike()), "own": _bits(parts.replica.held())})
        return told
    finally:
        mesh.close()


def _bits(shards: list[Any]) -> dict[str, list[int]]:
    return {shard.name: shard.local.contiguous().view(torch.int32).flatten().tolist() for shard in shards}


def bytes_of_steps(seat: meshes.Seat, sync: dict[str, Any], codec: str, steps: int) -> list[tuple[int, int]]:
    """What this rank's process has sent and received over TCP in each step; how many numbers the model has."""
    torch.set_num_threads(1)
    what = job(f"replicas={seat.world},micro_batch=2", steps, sync, precision="fp32", model="even")
    what = replace(what, sync=replace(what.sync, codec=codec, bucket_mib=25.0))
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts, told = assemble(what, mesh), []
        for step in range(steps):
            mesh.largest(0.0)
            before = traffic()
            parts.objective.step = step
            parts.sync.begin(step)
            parts.sync.end(parts.replica.gradients(cases.rank_batches(mesh, step, 0), parts.objective))
            mesh.largest(0.0)
            after = traffic()
            assert before is not None
            assert after is not None
            told.append((after.sent - before.sent, after.received - before.received))
        numbers = sum(shard.local.numel() for shard in parts.replica.held())
        return [*told, (numbers, numbers)]
    finally:
        mesh.close()


def saved_by(seat: meshes.Seat, layout: str, sync: dict[str, Any], model: str) -> dict[str, tuple[int, int]]:
    """Of each tensor of the state after a step: how many numbers it has, and how many this rank would save."""
    torch.set_num_threads(1)
    what = job(layout, 5, sync, model=model, tied=False)
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts = assemble(what, mesh)
        take_steps(parts, 1)
        found: dict[str, tuple[int, int]] = {}
        for shard in parts.sync.state().shards:
            before = found.get(shard.name, (0, 0))[1]
            found[shard.name] = math.prod(shard.global_shape), before + shard.local.numel() * shard.owner
        return found
    finally:
        mesh.close()
