"""What a parameter holds before training, as torch-free data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fill:
    """Independent normal values with this mean and standard deviation; std 0 = the constant `mean`."""

    mean: float = 0.0
    std: float = 0.0


ZEROS = Fill()
ONES = Fill(mean=1.0)
