"""Ranks of which one replica is slow, and what they tell each other of who waited; bytes to other replicas."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from shoal import mesh as meshes
from shoal.observe.traffic import traffic
from shoal.training.parts import assemble
from tests.equivalence import cases
from tests.sync import local_cases


def waits(
    seat: meshes.Seat, layout: str, sync: dict[str, Any], steps: int, slow: int, seconds: float, at: int = 0
) -> list[tuple[float, ...]]:
    """What each step told of who waited. slow: a rank that sleeps so long before what may be an exchange, in every step
    or (from 1) in this one."""
    torch.set_num_threads(1)
    what = local_cases.job(layout, steps, sync, model="even")
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts, told = assemble(what, mesh), []
        for step in range(steps):
            parts.objective.step = step
            parts.sync.begin(step)
            tally = parts.replica.gradients(cases.rank_batches(mesh, step, 0), parts.objective)
            if seat.member == slow and at in (0, step + 1):
                time.sleep(seconds)
            told.append(parts.sync.end(tally).waits)
        return told
    finally:
        mesh.close()


def sent_across(seat: meshes.Seat, layout: str, codec: str, steps: int) -> tuple[int, int, int, int]:
    """(bytes that this rank sent to other replicas in so many steps, and in all; numbers of its gradient; connections
    to other replicas)."""
    torch.set_num_threads(1)
    what = cases.job(layout, steps, precision="fp32", model="even")
    what = replace(what, sync=replace(what.sync, codec=codec, bucket_mib=25.0)).validate()
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts = assemble(what, mesh)
        before, all_before = traffic(mesh.across_descriptors), traffic()
        cases.take_steps(parts, steps)
        mesh.largest(0.0)
        time.sleep(0.2)  # the kernel counts what is acknowledged, which may take a moment
        after, all_after = traffic(mesh.across_descriptors), traffic()
        counts = [one.sent for one in (before, after, all_before, all_after) if one is not None]
        return counts[1] - counts[0], counts[3] - counts[2], parts.replica.summed(), len(mesh.across_descriptors)
    finally:
        mesh.close()
