"""Going on in another layout takes no more memory than starting in it: weights and optimizer state come in pieces."""

from __future__ import annotations

import pytest

from shoal.cli.main import main
from shoal.observe import metrics

WIDE = ["--model.hidden-size", "512", "--model.intermediate-size", "1536", "--model.num-hidden-layers", "4"]
SAVERS = ["replicas=2", "pipeline=2,micro_batch=2"]


@pytest.mark.nightly
@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize(
    "layout", ["replicas=2", "fsdp=2", "tensor=2", "context=2", "pipeline=2,micro_batch=2", "fsdp=2,tensor=2"]
)
def test_loading_stays_below_the_peak_of_a_first_run(arguments, tmp_path, layout, saver):
    """Resident memory of the fullest rank. Twice the same run differs by a few per cent itself."""
    first, saved = tmp_path / "first", tmp_path / "saved"
    words = [*arguments, *WIDE, "--train.steps", "3"]
    assert main([*words, "--layout", layout, "--run-dir", str(first)]) == 0
    assert main([*words, "--layout", saver, "--run-dir", str(saved)]) == 0
    assert main(["train", "--resume", str(saved), "--layout", layout, "--steps", "6"]) == 0
    peak = max(row["memory_gib"] for row in metrics.read(first))
    # The run folder has the rows of both starts; those of the second begin after step 3.
    resumed = max(row["memory_gib"] for row in metrics.read(saved) if row["step"] > 3)
    print(f"{layout} from {saver}: first run {peak:.3f} GiB, resumed {resumed:.3f} GiB")
    assert resumed <= 1.05 * peak
