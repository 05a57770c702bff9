"""What failures, restarts and checkpoints leave of a planned run's time: its expected goodput."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import JobError
from shoal.planning import goodput
from shoal.planning.goodput import Goodput
from shoal.planning.plan import Plan, Question

# Bytes of a parameter in a checkpoint: fp32, and AdamW's two moments (docs/checkpoints.md).
_STATE = 12.0


@dataclass(frozen=True)
class Expected:
    """mtbf: seconds between failures of any device. size: bytes of a checkpoint. stall: seconds that it takes, for all
    of which training is taken to wait: with one written behind it less is lost. restart: seconds from a failure to the
    step after the last checkpoint. shares: of the time, checkpoints being as frequent as is best; None where a run
    would never get on."""

    mtbf: float
    size: float
    stall: float
    restart: float
    shares: Goodput | None

    def days(self, plan: Plan) -> float | None:
        """To the token target, with all that fails. None without a target, or where it is never reached."""
        return None if self.shares is None or plan.days is None else plan.days / self.shares.training

    def cost(self, plan: Plan) -> float | None:
        """Of 1e9 tokens, with all that fails."""
        return None if self.shares is None or plan.cost is None else plan.cost / self.shares.training

    def told(self) -> dict[str, float | None]:
        """For scripts, of all plans: how much is lost does not depend on the layout."""
        shares = self.shares
        return {
            "goodput": 0.0 if shares is None else shares.training, "mtbf_seconds": self.mtbf,
            "restart_seconds": self.restart, "checkpoint_seconds": self.stall,
            "interval_seconds": None if shares is None else shares.interval,
        }  # fmt: skip


def stall_of(question: Question) -> float:
    """Seconds that all devices write a checkpoint for."""
    return _STATE * question.shape.parameters / (question.storage * question.cluster.count)


def expected(question: Question) -> Expected | None:
    """None where the cluster does not say how often its devices fail."""
    mtbf = question.cluster.mtbf
    if mtbf is None:
        return None
    size, stall = _STATE * question.shape.parameters, stall_of(question)
    try:
        shares = goodput.goodput(stall, question.restart, mtbf)
    except JobError:  # of hundreds of failures in each interval
        shares = None
    return Expected(mtbf, size, stall, question.restart, shares)
