"""The measured peak counts operations rightly, stays in its time, and leaves torch's random numbers alone."""

from __future__ import annotations

import time

import pytest
import torch

from shoal.observe import peak
from shoal.observe.mfu import Mfu


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_peak_is_that_of_the_fastest_product(precision, monkeypatch):
    """Against products that take a known time: 2·n³ operations at 1 TFLOP/s, the smallest at a tenth."""
    sizes: list[int] = []
    now = 0.0

    def timed(a, b, where):
        nonlocal now
        assert a.dtype == b.dtype == peak.DTYPES[precision]
        sizes.append(len(a))
        seconds = 2 * len(a) ** 3 / (1e11 if len(a) == 256 else 1e12)
        now += seconds
        return seconds

    monkeypatch.setattr(peak, "_once", timed)
    monkeypatch.setattr(peak.time, "perf_counter", lambda: now)
    assert peak.matmul_peak(torch.device("cpu"), precision, budget=0.03) == pytest.approx(1e12)
    # The next, 2048, would have taken four times 17 ms.
    assert sorted(set(sizes)) == [256, 512, 1024]
    assert now <= 0.03


def test_a_real_device_ends_soon_and_keeps_its_random_state():
    state = torch.get_rng_state()
    start = time.monotonic()
    assert peak.matmul_peak(torch.device("cpu"), "fp32", budget=0.05) > 1e6
    assert time.monotonic() - start < 5
    assert torch.equal(torch.get_rng_state(), state)


def test_mfu_by_hand():
    # 40 MFLOP a token, 50,000 tokens/s: 2 TFLOP/s of 2 × 2.5.
    assert Mfu(40e6, 2, 2.5e12).of(50_000) == pytest.approx(0.4)
    assert Mfu(40e6, 2, None).of(50_000) is None
    assert Mfu(40e6, 2, 2.5e12).of(None) is None
