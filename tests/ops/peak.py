"""Peak memory of one loss in this process, in MiB above what its inputs take: `python -m tests.ops.peak plain
131072 …`"""

from __future__ import annotations

import resource
import sys

import torch
import torch.nn.functional as F

from shoal.ops.loss import chunked_cross_entropy


def main(which: str, vocabulary: int, tokens: int, width: int) -> None:
    hidden_BLD = torch.randn(1, tokens, width).requires_grad_()
    weight_VD = torch.randn(vocabulary, width).mul_(0.02).requires_grad_()
    labels_BL, weight_BL = torch.randint(vocabulary, (1, tokens)), torch.ones(1, tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if which == "plain":
        F.cross_entropy((hidden_BLD @ weight_VD.T).flatten(0, 1), labels_BL.flatten(), reduction="sum").backward()
    else:
        chunked_cross_entropy(hidden_BLD, weight_VD, labels_BL, weight_BL).backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
