"""Peak memory of one loss in this process, in MiB above what its inputs take: `python -m tests.ops.peak plain
131072 …`"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from shoal.ops.loss import chunked_cross_entropy


def resident() -> int:
    """The most that this process has held, in KiB. (getrusage tells what its parent held, where that is more.)"""
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))


def main(which: str, vocabulary: int, tokens: int, width: int) -> None:
    hidden_BLD = torch.randn(1, tokens, width).requires_grad_()
    weight_VD = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    labels_BL, weight_BL = torch.randint(vocabulary, (1, tokens)), torch.ones(1, tokens)
    before = resident()
    if which == "plain":
        F.cross_entropy((hidden_BLD @ weight_VD.T).flatten(0, 1), labels_BL.flatten(), reduction="sum").backward()
    else:
        chunked_cross_entropy(hidden_BLD, weight_VD, labels_BL, weight_BL).backward()
    print((resident() - before) / 1024)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
