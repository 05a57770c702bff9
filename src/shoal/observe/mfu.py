"""Model FLOPs utilisation: which share of the devices' peak goes into the model's own arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.observe.units import si


@dataclass(frozen=True)
class Mfu:
    """Chowdhery et al. 2022, "PaLM", appendix B: recomputed activations do not count.

    flops_per_token: of forward and backward (`shoal.models.spec.flops_per_token`).
    peak: FLOP/s of one device, None where it is unknown; then there is no MFU.
    """

    flops_per_token: float
    devices: int
    peak: float | None

    def of(self, tokens_per_second: float | None) -> float | None:
        """A share (0.41 = 41 %), for the tokens per second of all devices together."""
        if not self.peak or tokens_per_second is None:
            return None
        return self.flops_per_token * tokens_per_second / (self.peak * self.devices)

    def note(self) -> str:
        """Formula and peak, in one line."""
        if not self.peak:
            return "MFU is not shown: the peak of this device is unknown"
        devices = f"{self.devices} devices × " if self.devices > 1 else ""
        return (
            f"MFU = tokens/s × {si(self.flops_per_token, 'FLOP')} per token (forward and backward) "
            f"÷ ({devices}{si(self.peak, 'FLOP/s')}, this device's measured matmul peak)"
        )
