"""When replicas that train apart exchange what they have learned: which fragment, after which step."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Rounds:
    """Every fragment is exchanged once in `every` steps, fragments taking turns; what is exchanged is `delay` steps
    old when it is applied.

    Fragment i of n is applied after the steps t = (i + 1) every / n, and every `every` steps from there. What would
    have left before the first step does not leave: with t ≤ delay a fragment is first applied a round later. Source:
    Douillard et al. 2025, "Streaming DiLoCo with overlapping communication", algorithm 2.
    """

    every: int
    fragments: int
    delay: int

    def starts(self, step: int) -> list[int]:
        """Fragments that leave after so many completed steps."""
        return self.ends(step + self.delay)

    def turns(self, step: int) -> list[int]:
        """Fragments whose sums begin their way back after so many completed steps: half of the delay before the end."""
        return self.ends(step + self.delay // 2)

    def ends(self, step: int) -> list[int]:
        """Fragments that are applied after so many completed steps."""
        firsts = [(i + 1) * self.every // self.fragments for i in range(self.fragments)]
        return [i for i, first in enumerate(firsts) if step >= first and (step - first) % self.every == 0]


def fragment_of(name: str, fragments: int) -> int:
    """Of a canonical name. Blocks in turn, so that each fragment has early ones and late ones (ibid., section 2.3.1,
    strided); what comes before them goes into the first fragment, what comes after into the last."""
    block = _BLOCK.search(name)
    if block:
        return int(block[1]) % fragments
    return 0 if "embed" in name else fragments - 1
