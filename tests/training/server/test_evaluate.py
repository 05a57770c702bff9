"""The loss on held-out text after a server job."""

from __future__ import annotations

import time
from typing import cast
from unittest import mock

from shoal.launch.train import ready
from shoal.mesh import Seat
from shoal.training.server import evaluate


def test_where_nothing_is_held_out_no_rank_connects(tiny, tmp_path):
    """One that left at once would break off the others' connecting."""
    job = tiny(tmp_path / "run", sync={"name": "server"}, data={"validation": 0.0})
    _, arguments = ready(job, None, time.time())
    told = {name: arguments[name] for name in ("folder", "job", "prepared")}
    with mock.patch.object(evaluate.mesh, "build", side_effect=AssertionError("connects")):
        assert evaluate.main(cast(Seat, None), step=0, **told) is None
