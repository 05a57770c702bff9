"""Ranks of the tests of this folder."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
import torch.distributed as dist

from shoal import device
from shoal import mesh as meshes
from shoal.membership.agree import next_view
from shoal.parallel.flat import Flat
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases


def survive(seat: meshes.Seat, victim: int, at: int, steps: int, behind: int = -1) -> dict[str, Any]:
    """Trains; `victim` is killed in step `at`, in the middle of its backward pass; the others go on without it.

    behind: a member that is cut off before its update, while the victim dies only after its own.
    """
    torch.set_num_threads(1)
    what = cases.job("replicas=3,micro_batch=2", steps, "adamw")
    assert what.layout is not None
    parts = assemble(what, meshes.build(what.layout, seat, timeout=60))
    losses, ledger, worlds = [0.0] * steps, [[] for _ in range(steps)], [0] * steps
    step = 0
    while step < steps:
        batches = cases.rank_batches(parts.mesh, step, 0)
        try:
            parts.sync.begin(step)
            tally = parts.replica.gradients(batches, _dying(parts, seat, victim, step == at and behind < 0))
            if step == at and seat.member == behind:
                parts.update.apply = _cut_off
            applied = parts.sync.end(tally)
            if step == at and behind >= 0:
                if seat.member == victim:
                    os.kill(os.getpid(), signal.SIGKILL)
                _next_collective(parts)
        except (RuntimeError, ConnectionError) as error:
            if not device.peer_gone(error):
                raise
            applied = None
        if applied is None:
            parts.update.__dict__.pop("apply", None)
            parts.sync.abandon()
            parts.mesh = parts.sync.reconfigure(next_view(seat, parts.mesh.view, grace=3))
            step = parts.update.done
            continue
        losses[step] = applied.loss_sum / applied.weight
        ledger[step] = [int(sample) for batch in batches for sample in batch.sample_B]
        worlds[step] = parts.mesh.world
        step += 1
    weights = {s.name: s.local.tolist() for s in parts.replica.shards()}
    number = parts.mesh.view.number
    parts.mesh.close()
    return {"losses": losses, "ledger": ledger, "worlds": worlds, "weights": weights, "view": number}


def _dying(parts: Parts, seat: meshes.Seat, victim: int, now: bool) -> Any:
    """The job's loss, but the victim is killed in its last backward pass, with some buckets sent and some not."""
    if not now or seat.member != victim:
        return parts.objective
    sent = []

    def half(flat: torch.Tensor, place: Flat) -> None:
        sent.append(flat)
        if len(sent) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        parts.sync._send(flat, place)

    parts.replica.on_bucket(half)
    return parts.objective


def _cut_off(scale: float) -> float:
    raise RuntimeError("Connection closed by peer")


def _next_collective(parts: Parts) -> None:
    """Where a rank that has finished its step learns that another has not."""
    parts.mesh.wait(dist.all_reduce(torch.zeros(1), group=parts.mesh.everyone, async_op=True))
