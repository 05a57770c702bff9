"""Which samples are used up, which are being computed on, which are next."""

from __future__ import annotations

from bisect import insort

from shoal.sync.server.messages import Range


class Samples:
    """Leases ranges of samples; a range is used up when its gradient is committed, and goes back when it is not.

    Sample i is used up if i < watermark or it lies in one of the exceptions. growing: more may come after `end`.
    """

    def __init__(self, end: int | None, watermark: int = 0, exceptions: tuple[Range, ...] = ()):
        """end: number of samples of the job; None = it has no end."""
        self.end, self.growing = end, False
        self.watermark, self.exceptions = watermark, list(exceptions)
        self._next = max([watermark, *(e.stop for e in exceptions)])
        self._free: list[Range] = []
        low = watermark
        for used in self.exceptions:
            if used.start > low:
                self._free.append(Range(low, used.start))
            low = used.stop
        self.used = watermark + sum(stop - start for start, stop in exceptions)

    def extend(self, end: int, growing: bool) -> None:
        """There are so many samples by now; where they are still growing, the job has more to come."""
        assert self.end is not None
        self.end, self.growing = max(self.end, end), growing

    def lease(self, most: int) -> Range | None:
        """The lowest free samples, at most so many in a row; None if there are none (now)."""
        assert most > 0
        if self._free:
            start, stop = self._free.pop(0)
            if stop - start > most:
                self._free.insert(0, Range(start + most, stop))
            return Range(start, min(stop, start + most))
        stop = self._next + most if self.end is None else min(self._next + most, self.end)
        if stop <= self._next:
            return None
        start, self._next = self._next, stop
        return Range(start, stop)

    def give_back(self, samples: Range) -> None:
        """They are leased no more, and not used up."""
        if samples.stop > samples.start:
            insort(self._free, samples)
            self._join_free()

    def claim(self, samples: Range) -> bool:
        """Leases exactly these, if they are free: for a lease that was forgotten in a crash. None are always free."""
        if samples.stop <= samples.start:
            return True
        if self.end is not None and samples.stop > self.end:
            return False
        if samples.start >= self._next:
            skipped, self._next = Range(self._next, samples.start), samples.stop
            self.give_back(skipped)
            return True
        for i, (start, stop) in enumerate(self._free):
            if start <= samples.start and samples.stop <= stop:
                self._free[i : i + 1] = [
                    r for r in (Range(start, samples.start), Range(samples.stop, stop)) if r[1] > r[0]
                ]
                return True
        return False

    def consume(self, samples: Range) -> None:
        """Leased ones are used up."""
        if samples.stop <= samples.start:
            return
        self.used += samples.stop - samples.start
        insort(self.exceptions, samples)
        while self.exceptions and self.exceptions[0].start == self.watermark:
            self.watermark = self.exceptions.pop(0).stop

    @property
    def leased(self) -> int:
        """All samples below were leased once, none above."""
        return self._next

    @property
    def available(self) -> bool:
        """There is something to lease now."""
        return bool(self._free) or self.end is None or self._next < self.end

    @property
    def finished(self) -> bool:
        """Every sample of the job is used up."""
        return self.end is not None and not self.growing and self.watermark >= self.end

    @property
    def dry(self) -> bool:
        """All that there are so far have been leased, and more may come."""
        return self.growing and not self.available

    def state(self) -> tuple[int, tuple[Range, ...]]:
        """(watermark, exceptions), for a checkpoint."""
        return self.watermark, tuple(self.exceptions)

    def _join_free(self) -> None:
        joined: list[Range] = []
        for part in self._free:
            if joined and joined[-1].stop == part.start:
                joined[-1] = Range(joined[-1].start, part.stop)
            else:
                joined.append(part)
        if joined[-1].stop == self._next:
            self._next = joined.pop().start
        self._free = joined
