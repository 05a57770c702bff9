"""How weights follow gradients: optimizer, learning-rate schedule, clipping."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.job.check import at_least, one_of, positive, require


@dataclass(frozen=True)
class OptimOptions:
    """AdamW with decoupled weight decay (Loshchilov and Hutter 2019), or another optimizer."""

    name: str = "adamw"
    """Optimizer: `adamw`; `sgd` (with `momentum`); `muon`: matrices inside blocks by Muon (docs/muon.md), all else by
    AdamW, with the same learning rate."""
    lr: float = 2e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW, also beside Muon: decay of the first and second moment."""
    eps: float = 1e-8
    """AdamW, also beside Muon: added to the root of the second moment."""
    momentum: float = 0.9
    """SGD: decay of the velocity."""
    muon_momentum: float = 0.95
    """Muon: decay of its momentum, which is Nesterov's."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices (norms and biases have none), times the learning rate."""
    schedule: str = "wsd"
    """`wsd`: warm-up, stable, then linear decay; `cosine`: warm-up, then half a cosine; `constant`: warm-up only."""
    warmup: float = 0.02
    """Share of the steps with linearly rising learning rate; above 1: so many steps."""
    decay: float = 0.25
    """wsd: share of the steps, at the end, with falling learning rate."""
    final_lr: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    clip: float = 1.0
    """Largest norm of the whole gradient; larger ones are scaled down to it. 0 = never."""

    def validate(self) -> None:
        one_of("optim.name", self.name, ("adamw", "sgd", "muon"))
        one_of("optim.schedule", self.schedule, ("cosine", "wsd", "constant"))
        positive("optim.lr", self.lr)
        positive("optim.eps", self.eps)
        for name in ("weight_decay", "warmup", "decay", "final_lr", "clip"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        require(self.decay <= 1, f"optim.decay={self.decay} is not a share", "from 0 to 1")
        what = f"optim.warmup={self.warmup} is neither a share nor a number of steps"
        require(self.warmup <= 1 or self.warmup == int(self.warmup), what, "from 0 to 1, or a whole number of steps")
        momenta = [(name, getattr(self, name)) for name in ("momentum", "muon_momentum")]
        for name, value in (("betas", self.betas[0]), ("betas", self.betas[1]), *momenta):
            require(0 <= value < 1, f"optim.{name}: {value} is not in [0, 1)", "e.g. 0.9")
