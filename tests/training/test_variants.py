"""Options that change how a step is computed, not what: the same losses in a run of two ranks."""

from __future__ import annotations

import shutil

import pytest

from shoal.observe import metrics
from tests.training.test_resume import losses


def trained(train, tiny, run, layout, **options) -> list[float]:
    train(tiny(run, layout, train={"steps": 6, **options}))
    assert metrics.read(run)[-1]["val_loss"] < metrics.read(run)[0]["loss"]
    return losses(run)


@pytest.mark.parametrize("layout", ["replicas=2", "fsdp=2,zero=3"])
def test_recompute(train, tiny, tmp_path, layout):
    """Bitwise: the same operations, some of them twice."""
    plain = trained(train, tiny, tmp_path / "plain", layout)
    assert trained(train, tiny, tmp_path / "recomputed", f"{layout},recompute=block") == plain


def test_the_use_of_experts_is_recorded(train, tiny, tmp_path):
    """One row a step has it; models without experts have none of it."""
    figures = {"balance_loss", "dropped_share", "busiest_load"}
    routed = {"family": "mixtral", "num_experts": 4, "capacity_factor": 1.0}
    train(tiny(tmp_path / "routed", "fsdp=2,expert=2", model=routed, train={"steps": 3}))
    train(tiny(tmp_path / "dense", "fsdp=2", train={"steps": 1}))
    rows = metrics.read(tmp_path / "routed")
    assert len(rows) == 3
    for row in rows:
        assert 0.9 < row["balance_loss"] < 2
        assert 0 < row["dropped_share"] < 1
        assert 1 < row["busiest_load"] <= 2
    assert not figures & metrics.read(tmp_path / "dense")[0].keys()


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPU")
@pytest.mark.parametrize(
    ("layout", "precision"),
    [("replicas=2", "fp32"), ("fsdp=2,zero=3,recompute=block", "fp32"), ("fsdp=2,zero=2,micro_batch=3", "bf16")],
)
def test_compile(train, tiny, tmp_path, layout, precision):
    plain = trained(train, tiny, tmp_path / "plain", layout, precision=precision)
    compiled = trained(train, tiny, tmp_path / "compiled", layout, precision=precision, compile="on")
    assert compiled == pytest.approx(plain, rel=1e-5 if precision == "fp32" else 2e-3)
