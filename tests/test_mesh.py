"""Meshes are closed and built again in one process, whatever was under way; a lost rank is noticed at once."""

from __future__ import annotations


def test_who_waits_for_a_rank_that_abandons_its_mesh_learns_of_it_at_once(ranks):
    # Within the timeout of the mesh (30 s) nothing else would tell them: rank 0 lives, and keeps its group.
    assert ranks.run("tests.launch.cases:abandoned", 3, timeout=20) == [[True, True]] * 3


def test_a_rank_killed_in_the_middle_of_a_message_is_noticed_by_all(ranks):
    # Gloo by itself waits for the rest of the message until the timeout of the mesh, 600 s.
    assert ranks.run("tests.launch.cases:killed_in_transfer", 3, timeout=60, lost={0}) == [None, True, True]
