"""How many steps a run of so many minutes has: estimated at its start, decided while its schedule still allows it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from shoal import device
from shoal.data.batch import Batch
from shoal.job import Job, shares
from shoal.optim.schedule import least_steps, of_length, open_until
from shoal.training.parts import Parts

# Validations that a run has on the way (see `settle.cadences`), beside the one at its end.
_GLANCES = 9
# How often a run looks at its pace; and steps that it must have seen for that, since the first ones are no measure.
_LOOKS, _FEWEST = 50, 3


@dataclass
class Length:
    """The length of one run, on one rank; all ranks call the same in the same step.

    ends: when the last validation shall be over, by time.time(). glance, final: tokens of a validation on the way
    and of the last one. decided: the length will not change any more.
    """

    ends: float
    glance: int
    final: int
    decided: bool = False
    _every: int = 0
    _validating: float | None = None
    _times: list[float] = field(default_factory=list)

    def estimate(self, parts: Parts, batches: list[Batch]) -> int:
        """Steps that fit, from real steps of the whole job, which leave the parts trained a little.

        Less than one where the time is over already.
        """
        times: list[float] = []
        often = shares.often(parts.job.sync, parts.mesh.replica)
        # Agreed times only: were each rank to look at its own clock, one might take a step more than another.
        while len(times) < 3 or (len(times) < 12 and sum(times[2:]) < 3):
            start = time.perf_counter()
            parts.sync.begin(0)
            parts.sync.end(parts.replica.gradients(batches, parts.objective))
            device.synchronize(parts.mesh.device)
            times.append(parts.mesh.largest((time.perf_counter() - start) * often))
        # The first steps allocate, and with compile on compile; the mean of the rest is what the run will see.
        usual = sum(times[2:]) / len(times[2:])
        # A pass over validation text takes a third of the time of training on as much.
        a_step = parts.job.train.global_batch * parts.job.data.sequence_length
        left = parts.mesh.largest(self.ends - time.time()) / usual - self.final / 3 / a_step
        glance, every = self.glance / 3 / a_step, parts.job.train.validate_every
        steps = round(left / (1 + glance / every) if every else left - _GLANCES * glance)
        self._every = max(1, steps // _LOOKS)
        return steps

    def validated(self, tokens: int, seconds: float) -> None:
        """What one validation has taken."""
        self._validating = seconds / tokens if tokens else None

    def follow(self, job: Job, step: int, agree: Callable[[float], float]) -> Job | None:
        """To be asked after every step: the job of the length that fits by the pace so far, where it has changed.

        agree: of what each rank measured, what all go by.
        So the number of steps follows the pace, until the learning rates begin to depend on it: then it is decided.
        """
        self._times.append(time.perf_counter())
        every = self._every or max(1, job.train.steps // _LOOKS)
        last = open_until(job.optim, job.train.steps)
        self.decided |= step > last
        if self.decided or step >= job.train.steps or (step % every and step != last):
            return None
        if len(self._times) < _FEWEST:
            self.decided = step == last
            return None
        # By the later half, validations and saves included: the machine may have changed, and first steps compile.
        half = len(self._times) // 2
        pace = (self._times[-1] - self._times[half]) / (len(self._times) - 1 - half)
        a_step = job.train.global_batch * job.data.sequence_length
        final = self.final * self._validating if self._validating else self.final / 3 / a_step * pace
        fits = round(agree((self.ends - time.time() - final) / pace))
        steps = max(step + 1, step + fits, least_steps(job.optim, job.train.steps))
        self.decided = step >= open_until(of_length(job.optim, job.train.steps, steps, step), steps)
        if self.decided:
            # However late it is: without a decay the run would be half wasted.
            least = min(0.1, job.optim.decay) if job.optim.schedule == "wsd" else 0.1
            steps = max(steps, step + round(least * step))
        elif steps == job.train.steps:
            return None
        optim = of_length(job.optim, job.train.steps, steps, step)
        return replace(job, optim=optim, train=replace(job.train, steps=steps))
