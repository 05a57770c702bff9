"""When a worker looks at the loss on held-out text, and which rows of the embedding it reads until then."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shoal.data.loader import Loader
from shoal.job import Job
from shoal.sync.server.messages import Range
from shoal.training.loop import GLANCE_TOKENS


class Glances:
    """When a worker looks at the loss on held-out text: where its samples come to another `validate_every` steps."""

    def __init__(self, job: Job):
        length = job.data.sequence_length
        limit = job.train.validate_tokens or GLANCE_TOKENS
        self.rows = max(1, limit // length)
        self._every, self._last = job.train.validate_every, 0
        self._first = True

    def near(self, step: int) -> bool:
        """Whether it is time to, and all weights are needed. step: that of the samples."""
        return step // self._every > self._last and not self._first

    def due(self, step: int, whole: bool = True) -> bool:
        """Whether it looks now; that counts as having looked. Never before the first step of a worker's life.

        whole: all weights are here; otherwise it looks at a later step.
        """
        near = self.near(step)
        if near and not whole:
            return False
        self._last, self._first = max(step // self._every, self._last), False
        return near


class Words:
    """Which rows of the embedding are read on samples: those of their tokens, on whichever of the worker's ranks."""

    def __init__(self, loader: Loader, glances: Glances | None):
        """glances: of the worker that looks at held-out text."""
        self.loader, self._glances = loader, glances

    @staticmethod
    def enough(job: Job) -> bool:
        """Whether a worker of this job reads only the embedding's rows of its tokens, and can pull them alone.

        A tied embedding is the output layer, too, which reads all rows. A worker's own steps move rows (by their
        momentum, and by weight decay in proportion to them) that its samples do not read. Of a codec's steps, a
        worker must get each.
        """
        tied = job.model.tie_word_embeddings
        return not tied and job.server.local_steps == 1 and job.sync.codec == "none"

    def __call__(self, samples: Range) -> NDArray[np.int64] | None:
        """In order, each once; None where held-out text is read before these samples, or they are not to be seen here
        yet: then all rows are needed, or may be."""
        loader, glances = self.loader, self._glances
        if glances is not None and glances.near(samples.start // loader.global_batch):
            return None
        # To look for more may take long, and who asks must go on saying that it lives.
        if loader.growing and loader.samples < samples.stop:
            return None
        return np.unique(loader.stretch(samples.start, samples.stop - samples.start).tokens_BL.numpy())
