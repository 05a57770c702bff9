"""Meshes are closed and built again in one process, whatever was under way; a lost rank is noticed at once."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from shoal.mesh import Mesh


def test_who_waits_for_a_rank_that_abandons_its_mesh_learns_of_it_at_once(ranks):
    # Within the timeout of the mesh (30 s) nothing else would tell them: rank 0 lives, and keeps its group.
    assert ranks.run("tests.launch.cases:abandoned", 3, timeout=20) == [[True, True]] * 3


def test_a_rank_killed_in_the_middle_of_a_message_is_noticed_by_all(ranks):
    # Gloo by itself waits for the rest of the message until the timeout of the mesh, 600 s.
    assert ranks.run("tests.launch.cases:killed_in_transfer", 3, timeout=60, lost={0}) == [None, True, True]


class DoneJustAfterAGlance:
    """A collective that ends between the moment a wait for it times out and the next question."""

    def __init__(self, error: Exception | None):
        self.error, self.done = error, False

    def wait(self, timeout: timedelta | None = None) -> None:
        if not self.done:
            self.done = True
            assert timeout is not None
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise self.error

    def is_completed(self) -> bool:
        return self.done


@pytest.mark.parametrize("error", [None, RuntimeError("Connection closed by peer")])
def test_a_collective_that_is_done_just_after_a_glance_ends_as_it_did(error: Exception | None):
    connections = SimpleNamespace(broken=lambda: False)
    mesh = cast(Mesh, SimpleNamespace(device=torch.device("cpu"), _connections=connections, _lost=lambda: ""))
    work = cast(Any, DoneJustAfterAGlance(error))
    if error is None:
        Mesh.wait(mesh, work)
    else:
        with pytest.raises(RuntimeError, match="Connection closed by peer"):
            Mesh.wait(mesh, work)
