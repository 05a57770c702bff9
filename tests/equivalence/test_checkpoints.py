"""What any layout saved, any other loads: weights and optimizer state bit by bit, and the next steps agree."""

from __future__ import annotations

import pytest

from tests.equivalence.checkpoints import pieces_equal

LAYOUTS = [
    "replicas=2",
    "fsdp=3",
    "fsdp=2,zero=1",
    "tensor=2",
    "tensor=4,micro_batch=3",
    "context=2",
    "pipeline=2,micro_batch=2",
    "pipeline=2,micro_batch=2,schedule=zbv",
    "pipeline=4,micro_batch=3",
]


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """A folder of each layout's checkpoint, after a step of its own."""
    folders = {}
    for number, layout in enumerate(LAYOUTS):
        folders[layout] = str(tmp_path_factory.mktemp(f"saved{number}"))
        ranks.run("tests.equivalence.checkpoints:save", _world(layout), layout=layout, folder=folders[layout])
    return folders


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_loads_what_every_layout_saved(ranks, saved, layout):
    others = [saved[other] for other in LAYOUTS if other != layout]
    results = ranks.run("tests.equivalence.checkpoints:load_all", _world(layout), layout=layout, folders=others)
    for folder, of_ranks in zip(others, zip(*results, strict=True), strict=True):
        pieces_equal(folder, of_ranks)


def _world(layout: str) -> int:
    from shoal.job import Layout

    return Layout.parse(layout).world
