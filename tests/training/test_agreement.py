"""Ranks that hold the same hold it to the last bit: one that does not is found before anything is saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal import checkpoint
from shoal.training.agreement import checksum

CASE = "tests.training.cases:flips_a_bit"


@pytest.mark.parametrize(
    ("layout", "victim", "who"),
    [
        ("replicas=3", 1, "rank 1 differs along replicas"),
        ("tensor=2", 1, "ranks 0 and 1 differ along tensor"),
        ("replicas=2,fsdp=2", 2, "ranks 0 and 2 differ along replicas"),
    ],
)
def test_one_bit_ends_the_run_before_it_is_saved(train, tiny, tmp_path, layout, victim, who):
    job = tiny(tmp_path / "run", layout, train={"steps": 6}, checkpoint={"every": 2})
    for error in train(job, entry=CASE, at=3, victim=victim):
        assert error["where"] == "step 4"
        assert error["what"].startswith(f"{who} in 'model.")
        assert "sync.compare=false" in error["fix"]
    newest = checkpoint.newest(tmp_path / "run/checkpoints", pytest.fail)
    assert newest is not None
    assert newest.name == "step-00000002"


def test_it_can_be_left_out(train, tiny, tmp_path):
    job = tiny(tmp_path / "run", "replicas=2", train={"steps": 4}, sync={"compare": False})
    assert train(job, entry=CASE, at=3, victim=1) == [{}, {}]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64])
@given(st.integers(0, 11), st.data())
def test_any_single_bit_changes_the_checksum(dtype, place, data):
    bit = data.draw(st.integers(0, 8 * dtype.itemsize - 1))
    tensor = torch.arange(24).to(dtype).view(6, 4)[:, :2]
    whole = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    other = tensor.contiguous()
    other.view(-1).view(whole)[place] ^= 1 << bit if bit < 8 * dtype.itemsize - 1 else -(1 << bit)
    assert checksum(tensor) != checksum(other)
    assert checksum(tensor) == checksum(tensor.clone())
