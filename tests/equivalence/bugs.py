"""Known ways to get data parallelism wrong, planted one at a time: the equivalence suite must see each."""

from __future__ import annotations

from typing import Any

from shoal import mesh as meshes
from shoal.parallel.replica import Tally
from shoal.training.parts import Parts, assemble
from tests.equivalence import cases


def run(seat: meshes.Seat, bug: str, layout: str, steps: int) -> dict[str, Any]:
    what = cases.job(layout, steps, "sgd")
    assert what.layout is not None
    mesh = meshes.build(what.layout, seat, timeout=60)
    try:
        parts = assemble(what, mesh)
        plant(parts, bug)
        return cases.take_steps(parts, steps)
    finally:
        mesh.close()


def plant(parts: Parts, bug: str) -> None:
    objective, sync, replica = parts.objective, parts.sync, parts.replica
    if bug == "mean":

        def mean(module, batch):
            loss_sum, weight = objective(module, batch)
            return loss_sum / weight, weight / weight

        parts.objective = mean  # type: ignore[assignment]
    elif bug == "scaled":
        end = sync.end
        sync.end = lambda tally: end(Tally(tally.loss_sum, tally.weight / parts.mesh.world))  # type: ignore[method-assign]
        # Clipping hides a scale, as it does in real jobs; without it the bug must show.
        sync.clip = 0.0
    elif bug == "bucket":
        sent: list[int] = []

        def skip_second(flat):
            sent.append(1)
            if len(sent) != 2:
                sync._send(flat)

        replica.on_bucket(skip_second)
    elif bug == "local":
        end = sync.end

        def local(tally):
            before = tally.weight.clone()
            applied = end(tally)
            for shard in replica.shards():
                shard.grad.mul_(applied.weight / parts.mesh.world / before)
            return applied

        sync.end = local  # type: ignore[method-assign]
    else:
        raise AssertionError(bug)
