"""Several ranks' savers in one process, and states whose every bit follows from the step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal import checkpoint
from shoal.checkpoint import Pending, Saver
from shoal.shard import Shard, State

ROWS, COLUMNS = 12, 5
# Rows of a state that takes a while to write, and is larger than the small disks of these tests.
LARGE = 20_000


class Fleet:
    """`world` savers of the run whose checkpoints are in `root`."""

    def __init__(self, root: Path, world: int = 3, keep: int = 2, nonce: str = "first", timeout: float = 20.0):
        self.root = root
        self.savers = [Saver(root, rank, world, keep, nonce=nonce, timeout=timeout) for rank in range(world)]

    def save(self, states: list[State], step: int) -> list[Pending]:
        """Saves one state a rank and waits for all."""
        # Rank 0 last: its helper then waits for parts that may be there already, and those come early.
        pending = [saver.save(state, step) for saver, state in reversed([*zip(self.savers, states, strict=True)])]
        for one in pending:
            assert one.wait(30)
        return pending[::-1]

    def step(self, step: int, rows: int = ROWS) -> list[Pending]:
        """Saves the state of `step`, its rows spread over all ranks."""
        return self.save([rank_state(step, rank, len(self.savers), rows) for rank in range(len(self.savers))], step)

    def helper(self, rank: int) -> int:
        """Process id."""
        return self.savers[rank]._helper.process.pid

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        for saver in self.savers:
            saver.close(0.0)


def whole(step: int, name: str, rows: int = ROWS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step * 1000 + len(name))
    return torch.randn(rows, COLUMNS, generator=generator)


def rank_state(step: int, rank: int, world: int, rows: int = ROWS) -> State:
    """Two sharded tensors, and one that all ranks hold and rank 1 (or 0) saves."""
    begin, end = rows * rank // world, rows * (rank + 1) // world
    shards = [
        Shard(name, (rows, COLUMNS), (begin, 0), whole(step, name, rows)[begin:end])
        for name in ("norm.weight", "exp_avg.norm.weight")
    ]
    scalar = torch.tensor(float(step), dtype=torch.float64)
    return State([*shards, Shard("count", (), (), scalar, owner=rank == min(1, world - 1))], {"step": step})


def assert_is(folder: Path, step: int, rows: int = ROWS, verified: bool = False) -> None:
    """The checkpoint holds the state of `step`, bit by bit."""
    wanted = [
        Shard(name, (rows, COLUMNS), (0, 0), torch.full((rows, COLUMNS), float("nan")))
        for name in ("norm.weight", "exp_avg.norm.weight")
    ]
    count = Shard("count", (), (), torch.tensor(float("nan"), dtype=torch.float64))
    assert checkpoint.load(folder, [*wanted, count], verified=verified) == {"step": step}
    for shard in wanted:
        assert torch.equal(shard.local, whole(step, shard.name, rows))
    assert count.local.item() == step


def newest_is_whole(root: Path, *steps: int, rows: int = ROWS) -> int:
    """Returns its step, 0 if there is none."""
    folder = checkpoint.newest(root, pytest.fail)
    step = checkpoint.describe(folder)["step"] if folder else 0
    assert step in steps
    if folder:
        assert_is(folder, step, rows, verified=True)
    return step


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())
