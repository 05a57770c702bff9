"""What is computed: models as plain modules that know nothing of ranks, and their shapes as torch-free
data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shoal.job.model import ModelOptions

if TYPE_CHECKING:
    from shoal.models.decoder import Decoder

__all__ = ["build"]


def build(options: ModelOptions, layers: range | None = None) -> Decoder:
    """The model, on the default device, in float32, its parameters not yet filled: initialise or load them.

    layers: only these consecutive blocks of it, with the embedding if they are the first and the head if the last.

    Under `torch.device("meta")` it takes no memory. (torch is imported here, so that `models.spec` starts
    without.)
    """
    from shoal.models.decoder import create

    return create(options, layers)
