"""What ranks do in the tests of training: they train as always, and are watched or disturbed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import os
import pickle
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed.distributed_c10d as c10d
from torch import Tensor

from shoal import checkpoint
from shoal import mesh as meshes
from shoal.checkpoint import Pending, Saver, manifest
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.errors import DivergedError
from shoal.job import Layout, parse, read
from shoal.launch.forkserver import resolve
from shoal.mesh import Seat
from shoal.observe import files
from shoal.training import loop, validate, worker
from shoal.training.loop import Loop
from shoal.training.objective import Objective
from shoal.training.parts import Parts, assemble
from tests.launch import sockets


@contextlib.contextmanager
def around_steps(before: Callable[[Loop], None], after: Callable[[Loop], None]) -> Iterator[None]:
    """Calls these around every step of this rank's loop; `step` counts from 0 before it."""
    real = Loop._step

    def step(self: Loop, *args: Any) -> Any:
        before(self)
        done = real(self, *args)
        after(self)
        return done

    with mock.patch.object(Loop, "_step", step):
        yield


def digest(parts: Parts) -> str:
    """Of all that an update changes: weights, moments and their count."""
    found = hashlib.sha256(str(parts.update.values()).encode())
    for shard in (*parts.replica.shards(), *parts.update.state()):
        found.update(shard.local.contiguous().numpy().tobytes())
    return found.hexdigest()


class _Broken(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.inf


def nonfinite(seat: Seat, what: str, at: list[int], victim: int, **args: Any) -> dict[str, Any]:
    """Steps `at` (from 1) have a NaN loss with finite gradients, or a finite loss with infinite ones, in one rank;
    or one of its weights is NaN.

    Returns the digests of weights and optimizer before the first and after every step, and why the run ended.
    """
    digests: list[str] = []
    now = [False]
    real = Objective.__call__

    def broken(self: Objective, module: Any, batch: Any, hidden: Any = None) -> tuple[Tensor, Tensor]:
        loss_sum, weight = real(self, module, batch, hidden)
        if now[0] and what != "weights":
            loss_sum = loss_sum + torch.nan if what == "loss" else _Broken.apply(loss_sum)
        return loss_sum, weight

    def before(run: Loop) -> None:
        if not digests:
            digests.append(digest(run.parts))
        now[0] = seat.member == victim and run.step + 1 in at
        if now[0] and what == "weights":
            run.parts.replica.held()[0].local.view(-1)[0] = torch.nan

    def after(run: Loop) -> None:
        now[0] = False
        digests.append(digest(run.parts))

    error: DivergedError | None = None
    with mock.patch.object(Objective, "__call__", broken), around_steps(before, after):
        try:
            worker.main(seat, **args)
        except DivergedError as caught:
            error = caught
    return {"digests": digests, "error": error and {"what": error.what, "where": error.where, "fix": error.fix}}


def flips_a_bit(seat: Seat, at: int, victim: int, **args: Any) -> dict[str, Any]:
    """After step `at`, one bit of the first norm is another on one rank. Returns why the run ended."""

    def after(run: Loop) -> None:
        if seat.member == victim and run.step == at:
            (norm,) = [s for s in run.parts.sync.alike() if s.name == "model.layers.0.input_layernorm.weight"]
            norm.local.view(-1).view(torch.int32)[0] ^= 1

    try:
        with around_steps(lambda run: None, after):
            worker.main(seat, **args)
    except DivergedError as error:
        return {"what": error.what, "where": error.where, "fix": error.fix}
    return {}


def validated(seat: Seat, folder: str, prepared: str, rows: int, bug: bool = False) -> list[float]:
    """[nats per token, tokens] of the first weights on the first validation rows. bug: rows that fill up count."""
    job = read(Path(folder) / "job.toml")
    assert job.layout is not None
    ranks = meshes.build(job.layout, seat, timeout=60)
    try:
        parts = assemble(job, ranks)
        loader = Loader(Prepared.load(prepared), job.data, "validation", job.train.global_batch)

        def heavy(batch: Any, where: torch.device) -> Any:
            return loader.rows(batch.sample_B.numpy())

        with mock.patch.object(validate, "on_device", heavy) if bug else contextlib.nullcontext():
            found = validate.validate(parts.job, parts.replica, parts.objective, loader, rows)
        return [found.nats, found.tokens]
    finally:
        ranks.close()


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("pickled")


def without_pickle(seat: Seat, entry_: str, **args: Any) -> Any:
    """Calls `entry_` where all ways into pickle fail."""
    importlib.import_module("torch._dynamo")  # makes a class of Pickler
    with contextlib.ExitStack() as patches:
        for name in ("loads", "load", "Unpickler", "_Unpickler", "dumps", "dump", "Pickler", "_Pickler"):
            patches.enter_context(mock.patch.object(pickle, name, _refuse))
        for name in ("load", "save"):
            patches.enter_context(mock.patch.object(torch, name, _refuse))
        for name in ("_pickler", "_unpickler"):  # behind torch.distributed's *_object_list
            patches.enter_context(mock.patch.object(c10d, name, _refuse))
        return resolve(entry_)(seat, **args)


def gathers_objects(seat: Seat) -> None:
    """What `without_pickle` must refuse."""
    ranks = meshes.build(meshes.Layout(replicas=seat.world), seat, timeout=60)
    torch.distributed.broadcast_object_list([{"step": 1}], group=ranks.everyone)


def listening(seat: Seat, **args: Any) -> list[str]:
    """Addresses at which all processes of the run listen in its second step."""
    found: list[str] = []

    def look(run: Loop) -> None:
        if run.step == 1 and seat.member == 0:
            found.extend(sockets.listening(sockets.family(os.getppid())))

    with around_steps(look, lambda _: None):
        worker.main(seat, **args)
    return found


def full_disk(seat: Seat, victim: int, after: int, until: int, **args: Any) -> Any:
    """Steps `after` < step ≤ `until` find no space for the files of one rank's checkpoints."""
    real = Loop.save
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    def save(self: Loop) -> None:
        if seat.member == victim:
            full = after < self.step <= until
            resource.prlimit(
                self.saver._helper.process.pid, resource.RLIMIT_FSIZE, (10_000, unlimited[1]) if full else unlimited
            )
        real(self)
        assert self.saved is not None
        self.saved.wait()  # the limit of the next save must not meet this one

    with mock.patch.object(Loop, "save", save):
        return worker.main(seat, **args)


def loses_its_helper(seat: Seat, victim: int, at: list[int], **args: Any) -> Any:
    """One rank's helper process is killed in the first save of each of these steps, before it has written anything."""
    real, left = Saver.save, list(at)

    def save(self: Saver, state: Any, step: int) -> Pending:
        doomed = seat.member == victim and step in left
        if doomed:
            left.remove(step)
            if self._pending is not None:
                self._pending.wait()  # the one before is not meant
            os.kill(self._helper.process.pid, signal.SIGSTOP)
        pending = real(self, state, step)
        if doomed:
            os.kill(self._helper.process.pid, signal.SIGKILL)
        return pending

    with mock.patch.object(Saver, "save", save):
        return worker.main(seat, **args)


def slow_at_the_end(seat: Seat, **args: Any) -> Any:
    """Rank 1's helper process stands still for a while when it is given the last save."""
    real = Saver.save

    def save(self: Saver, state: Any, step: int) -> Pending:
        pending = real(self, state, step)
        if seat.member == 1 and step == 8:
            helper = self._helper.process.pid
            os.kill(helper, signal.SIGSTOP)
            threading.Timer(1.5, os.kill, (helper, signal.SIGCONT)).start()
        return pending

    with mock.patch.object(Saver, "save", save), mock.patch.object(loop, "_SLOW", 0.3):
        return worker.main(seat, **args)


def ledger(seat: Seat, **args: Any) -> list[list[int]]:
    """This rank's samples of each step."""
    seen: list[list[int]] = []
    real = loop.step_batches

    def watched(*words: Any) -> Any:
        batches = real(*words)
        seen.append([int(sample) for batch in batches for sample in batch.sample_B])
        return batches

    with mock.patch.object(loop, "step_batches", watched):
        worker.main(seat, **args)
    return seen


def deleting_its_folder(seat: Seat, **args: Any) -> Any:
    """Trains; then somebody deletes the run's folder."""
    figures = worker.main(seat, **args)
    if seat.member == 0:
        shutil.rmtree(args["folder"])
    return figures


def without_space(seat: Seat, **args: Any) -> Any:
    """Trains while no file of the run folder can be replaced. (Checkpoints are written by another process.)"""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(files, "replace", side_effect=full):
        return worker.main(seat, **args)


def loaded(seat: Seat, job: str, layout: str, folder: str) -> dict[str, Any]:
    """What a rank has after it has loaded a checkpoint in another layout."""
    what = replace(parse(job), layout=Layout.parse(layout)).validate()
    assert what.layout is not None
    ranks = meshes.build(what.layout, seat, timeout=60)
    try:
        parts = assemble(what, ranks, fresh=False)
        wanted = parts.sync.wanted(manifest.read(Path(folder)))
        parts.sync.restore(checkpoint.load(Path(folder), wanted))
        weights = {shard.name: shard.local.tolist() for shard in parts.replica.held()}
        slots = {shard.name.partition(".")[2]: shard.local.tolist() for shard in parts.update.state()[: len(weights)]}
        unsent = {s.name: s.local.tolist() for s in parts.sync.state().shards if s.name.startswith("unsent")}
        return {"replica": ranks.replica, "weights": weights, "moments": slots, "unsent": unsent}
    finally:
        ranks.close()


def asked_to_stop(seat: Seat, at: int, victim: int, **args: Any) -> dict[str, Any]:
    """After step `at`, somebody asks one rank to stop."""

    def after(run: Loop) -> None:
        run.stop.asked |= seat.member == victim and run.step == at

    with around_steps(lambda run: None, after):
        return worker.main(seat, **args)
