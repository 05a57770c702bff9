"""Ranks of the tests of this folder."""

from __future__ import annotations

import os
import signal
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from shoal import device
from shoal import mesh as meshes
from shoal.membership.agree import next_view
from shoal.parallel.flat import Flat
from shoal.sync import AllReduce
from shoal.sync.lowrank import LowRank, LowRankSum
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases
from tests.sync.feedback_cases import Coarse

CODECS = {"coarse": Coarse, "lowrank": partial(LowRank, 2)}


def survive(
    seat: meshes.Seat, victim: int, at: int, steps: int, behind: int = -1, codec: str = "", share: str = "",
    since: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Trains; `victim` is killed in step `at`, in the middle of its backward pass; the others go on without it.

    behind: a member that is cut off before its update, while the victim dies only after its own. codec: of `CODECS`;
    gradients go through it, with feedback; then `kept` is what is kept, right after the loss, of what it lost, and
    `known` what is the same on all. share: of the batch, each replica's. since: optimizers have seen all updates but as
    many as their member's number, when the victim dies.
    """
    torch.set_num_threads(1)
    parts = _parts(seat, steps, codec, share)
    kept: list[Any] = []
    known: list[Any] = []
    losses, ledger, worlds = [0.0] * steps, [[] for _ in range(steps)], [0] * steps
    step = 0
    while step < steps:
        batches = cases.rank_batches(parts.mesh, step, 0)
        if since and step == at and parts.mesh.world == 3:
            parts.update.since = seat.member
        try:
            parts.sync.begin(step)
            tally = parts.replica.gradients(batches, _dying(parts, seat, victim, step == at and behind < 0))
            if step == at and seat.member == behind:
                parts.update.apply = partial(_cut_off, parts)
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
            kept = _kept(parts) if codec else []
            known = [s.local.tolist() for s in parts.sync._common()]
            continue
        losses[step] = applied.loss_sum / applied.weight
        ledger[step] = [int(sample) for batch in batches for sample in batch.sample_B]
        worlds[step] = parts.mesh.world
        step += 1
    weights = {s.name: s.local.tolist() for s in parts.replica.shards()}
    number = parts.mesh.view.number
    parts.mesh.close()
    return {
        "losses": losses, "ledger": ledger, "worlds": worlds, "weights": weights, "view": number, "kept": kept,
        "known": known, "since": parts.update.since, "counts": parts.update._counts[0].item(),
    }  # fmt: skip


def undisturbed(seat: meshes.Seat, steps: int, stop: int, codec: str) -> list[Any]:
    """What each rank keeps of what was lost in the steps before `stop`, when nobody is killed."""
    torch.set_num_threads(1)
    parts = _parts(seat, steps, codec)
    cases.take_steps(parts, stop)
    kept = _kept(parts)
    parts.mesh.close()
    return kept


def _parts(seat: meshes.Seat, steps: int, codec: str, share: str = "") -> Parts:
    what = cases.job(f"replicas=3,micro_batch={1 if share else 2}{f',replica_share={share}' if share else ''}", steps)
    assert what.layout is not None
    parts = assemble(what, meshes.build(what.layout, seat, timeout=60))
    if codec:
        parts.sync = AllReduce(parts.mesh, what.optim.clip, CODECS[codec]())
        parts.sync.attach(parts.replica, parts.update)
    return parts


def _kept(parts: Parts) -> list[Any]:
    """Of each flat tensor, what this rank keeps of its own gradient and of the sums of its chunk, added up."""
    feedback = parts.sync._encoded.feedback
    kept = []
    for place in parts.replica.flats():
        total_N = feedback.own.kept[place].numbers_N.clone()
        if place in feedback.sums.kept:
            first, numbers_n = feedback.sums.kept[place]
            total_N[first : first + len(numbers_n)] += numbers_n
        kept.append(total_N.tolist())
    return kept


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


def _cut_off(parts: Parts, *_: object) -> float:
    if isinstance(parts.sync._encoded, LowRankSum):
        # Nor has it seen the last sums, of which the next directions are made.
        parts.sync._encoded._after.clear()
    raise RuntimeError("Connection closed by peer")


def _next_collective(parts: Parts) -> None:
    """Where a rank that has finished its step learns that another has not."""
    parts.mesh.wait(dist.all_reduce(torch.zeros(1), group=parts.mesh.everyone, async_op=True))
