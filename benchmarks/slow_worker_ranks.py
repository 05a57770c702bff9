"""What runs in the processes of `benchmarks/slow_worker.py`: a worker that is slowed down, and the loss afterwards."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from shoal import checkpoint, device
from shoal import mesh as meshes
from shoal.checkpoint import manifest
from shoal.data.loader import Loader
from shoal.data.prepare import Prepared
from shoal.job import parse
from shoal.mesh import Seat
from shoal.training.parts import spread
from shoal.training.server import plan, work
from shoal.training.validate import validate


def main(seat: Seat, *, pad: float, told: str, **args: Any) -> dict[str, Any]:
    """A worker of a server, each gradient of which takes `pad` seconds. told: file for how many took longer."""
    plain, overran = work.spread, 0

    def padded(*given: Any, **named: Any) -> Any:
        replica, objective = plain(*given, **named)
        compute = replica.gradients

        def gradients(*batches: Any, **how: Any) -> Any:
            nonlocal overran
            start = time.perf_counter()
            tally = compute(*batches, **how)
            left = pad - (time.perf_counter() - start)
            overran += left < 0
            time.sleep(max(0.0, left))
            return tally

        replica.gradients = gradients
        return replica, objective

    # Of this process alone, which ends with the run.
    work.spread = padded
    answered = work.main(seat, **args)
    Path(told).write_text(json.dumps({**answered, "overran": overran}))
    return answered


def losses(seat: Seat, *, folder: str, job: str, prepared: str, rows: int) -> list[dict[str, Any]]:
    """Step, version and loss in nats per token of all checkpoints of a run, on its first `rows` held-out rows."""
    given = plan.of_worker(parse(job))
    assert given.layout is not None
    held_out = Loader(Prepared.load(Path(prepared)), given.data, "validation", given.train.global_batch)
    with meshes.build(given.layout, seat) as mesh:
        device.keep_memory(mesh.device)
        replica, objective = spread(given, mesh, fresh=False)
        found = []
        for path in checkpoint.complete(Path(folder) / "checkpoints"):
            values = manifest.read(path).values
            checkpoint.load(path, replica.held())
            loss = validate(given, replica, objective, held_out, rows).nats
            found.append({"step": values["step"], "version": int(values["update"]["updates"]), "loss": loss})
        return found
