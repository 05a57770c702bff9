"""Dropout by hash against torch's own, forward and backward.

    python benchmarks/dropout.py [--rows 1024] [--width 2048] [--rate 0.1] [--dtype fp32] [--threads 1] [--blocks 20]

torch: torch.nn.functional.dropout, which draws from a generator and keeps its mask for backward. shoal: the hash,
which makes the mask again. Each eager and compiled (dropout alone: in a block, torch.compile fuses the hash with
what stands around it); A/A is shoal against shoal. Prints one JSON object: median milliseconds of each, and the
ratios torch / shoal with their lower 95 % bounds over paired blocks of ten calls. Above 1, shoal is faster.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.paired import interleave, ratio

from shoal.ops.dropout import Dropout

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CALLS = 10


def block(function: Callable[[Tensor], Tensor], x_BLD: Tensor, gradient_BLD: Tensor) -> Callable[[], float]:
    """Seconds of one forward and backward, the mean of ten."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(CALLS):
            torch.autograd.grad(function(x_BLD), x_BLD, gradient_BLD)
        return (time.perf_counter() - start) / CALLS

    run()  # compiles, and touches memory for the first time
    return run


def measure(rows: int, width: int, rate: float, dtype: torch.dtype, blocks: int) -> dict[str, object]:
    layer = Dropout(rate, 0, 0, torch.arange(1), torch.arange(rows)).at(0)
    functions = {"torch": lambda x: F.dropout(x, rate), "shoal": lambda x: layer(x, 0)}
    x_BLD = torch.randn(1, rows, width, dtype=dtype, requires_grad=True)
    gradient_BLD = torch.randn_like(x_BLD)
    contenders = {}
    for name, function in functions.items():
        contenders[name] = block(function, x_BLD, gradient_BLD)
        contenders[f"{name} compiled"] = block(torch.compile(function), x_BLD, gradient_BLD)
    for name in ("shoal", "shoal compiled"):
        contenders[f"{name} again"] = contenders[name]
    seconds = interleave(contenders, blocks)
    pairs = {
        "eager": ("torch", "shoal"),
        "compiled": ("torch compiled", "shoal compiled"),
        "aa_eager": ("shoal", "shoal again"),
        "aa_compiled": ("shoal compiled", "shoal compiled again"),
    }
    ratios = {key: [round(r, 3) for r in ratio(seconds[a], seconds[b])] for key, (a, b) in pairs.items()}
    milliseconds = {name: round(1e3 * statistics.median(values), 3) for name, values in seconds.items()}
    return {"ms": milliseconds, "ratio_and_lower_bound": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=20)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    found = measure(asked.rows, asked.width, asked.rate, DTYPES[asked.dtype], asked.blocks)
    print(json.dumps({**found, **vars(asked), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
