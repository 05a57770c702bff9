"""How many steps a run of so many minutes has: estimated at its start, decided while its schedule still allows it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from shoal import device
from shoal.data.batch import Batch
from shoal.job import Job
from shoal.optim.schedule import of_length, open_until
from shoal.training.parts import Parts

# Validations that a run has on the way (see `settle.cadences`), beside the one at its end.
_GLANCES = 9


@dataclass
class Length:
    """The length of one run, on one rank; all ranks call the same in the same step.

    ends: when the last validation shall be over, by time.time(). glance, final: tokens of a validation on the way
    and of the last one. A pass over them takes a third of the time of training on as many.
    """

    ends: float
    glance: int
    final: int
    _times: list[float] = field(default_factory=list)

    def estimate(self, parts: Parts, batches: list[Batch]) -> int:
        """Steps that fit, from real steps of the whole job, which leave the parts trained a little."""
        times: list[float] = []
        # Agreed times only: were each rank to look at its own clock, one might take a step more than another.
        while len(times) < 3 or (len(times) < 12 and sum(times[2:]) < 3):
            start = time.perf_counter()
            parts.sync.begin(0)
            parts.sync.end(parts.replica.gradients(batches, parts.objective))
            device.synchronize(parts.mesh.device)
            times.append(parts.mesh.largest(time.perf_counter() - start))
        # The first steps allocate, and with compile on compile; the mean of the rest is what the run will see.
        usual = sum(times[2:]) / len(times[2:])
        left = parts.mesh.largest(self.ends - time.time())
        return max(1, round(left / usual - self._in_steps(parts, self.final + _GLANCES * self.glance)))

    def decided(self, parts: Parts, step: int) -> Job | None:
        """To be asked after every step: the job of the length that fits by the pace so far, once.

        It comes at the last step at which the learning rates so far are those of any length. What is already
        behind is not undone: a tenth of it follows at least.
        """
        self._times.append(time.perf_counter())
        job = parts.job
        if step != open_until(job.optim, job.train.steps) or step == job.train.steps or len(self._times) < 3:
            return None
        # By the later half, validations and saves included: the machine may have changed, and first steps compile.
        half = len(self._times) // 2
        pace = (self._times[-1] - self._times[half]) / (len(self._times) - 1 - half)
        left = parts.mesh.largest((self.ends - time.time()) / pace) - self._in_steps(parts, self.final)
        steps = step + max(1, step // 10, round(left))
        return replace(job, optim=of_length(job.optim, job.train.steps, steps), train=replace(job.train, steps=steps))

    @staticmethod
    def _in_steps(parts: Parts, validated: int) -> float:
        return validated / 3 / (parts.job.train.global_batch * parts.job.data.sequence_length)
