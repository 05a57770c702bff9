"""After the last update: the loss on all held-out text, of the weights that were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from shoal import checkpoint, device, mesh
from shoal.checkpoint import manifest
from shoal.data.prepare import Prepared
from shoal.job import parse
from shoal.mesh import Seat
from shoal.training.parts import spread
from shoal.training.validate import validate
from shoal.training.worker import held_out


def main(seat: Seat, *, folder: str, job: str, prepared: str, step: int) -> dict[str, Any] | None:
    """Mean loss and number of tokens; None where nothing is held out, or the checkpoint of `step` was not saved.

    On as many ranks as the workers had between them.
    """
    run, given = Path(folder), parse(job)
    assert given.layout is not None
    validation = held_out(Prepared.load(Path(prepared)), given)
    newest = next(iter(checkpoint.complete(run / "checkpoints")), None)
    # Before they connect: a rank that left at once would break off the others' connecting.
    if validation is None or newest is None or manifest.read(newest).values["step"] != step:
        return None
    with mesh.build(given.layout, seat, timeout=given.sync.timeout) as ranks:
        device.keep_memory(ranks.device, gathering=given.layout.sharers > 1)
        replica, objective = spread(given, ranks, fresh=False)
        checkpoint.load(newest, replica.held())
        limit = given.train.validate_tokens or validation.samples * given.data.sequence_length
        found = validate(given, replica, objective, validation, max(1, limit // given.data.sequence_length))
        return {"nats": found.nats, "tokens": found.tokens}
