"""Routed experts by grouped products, against sorting, splitting and a linear layer each: a forward and a backward.

    python benchmarks/grouped.py [--tokens 4096] [--width 512] [--inner 1024] [--experts 8] [--choices 2] [--blocks 20]

Prints one JSON object for each precision. ratio: time of the loop over ours, geometric mean over paired blocks, with
its lower 95 % bound; aa: the same of ours against itself. Both contenders route alike, unevenly (`busiest`: the busiest
expert, in multiples of the mean), and combine with the same weights.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.paired import interleave, ratio

from shoal.device import keep_memory, synchronize
from shoal.job.model import ModelOptions
from shoal.models.moe import Experts


def split(own: Experts, x_ND: Tensor, index_NK: Tensor, weight_NK: Tensor) -> Tensor:
    """The usual way: sort, split by expert, a linear layer each, put together, weigh and add up."""
    by_expert_M = index_NK.flatten().argsort(stable=True)
    token_M = by_expert_M // index_NK.shape[1]
    sizes = index_NK.flatten().bincount(minlength=len(own.gate_EFD)).tolist()
    out = [
        F.linear(F.silu(F.linear(rows, gate)) * F.linear(rows, up), down)
        for rows, gate, up, down in zip(x_ND[token_M].split(sizes), own.gate_EFD, own.up_EFD, own.down_EDF, strict=True)
    ]
    weighted_MD = torch.cat(out) * weight_NK.flatten()[by_expert_M, None].to(out[0].dtype)
    return weighted_MD.new_zeros(x_ND.shape).index_add(0, token_M, weighted_MD)


def contender(way: Callable[..., Tensor], args: tuple[Tensor, ...], own: Experts, bf16: bool) -> Callable[[], float]:
    device = args[0].device

    def seconds() -> float:
        for tensor in (*args, *own.parameters()):
            tensor.grad = None
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = way(*args).float().square().mean()
        loss.backward()
        synchronize(device)
        return time.perf_counter() - start

    return seconds


def measure(asked: argparse.Namespace, bf16: bool) -> dict[str, object]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_memory(device)  # as training ranks do
    torch.manual_seed(0)
    options = ModelOptions(
        family="mixtral", hidden_size=asked.width, intermediate_size=asked.inner, num_experts=asked.experts
    )
    own = Experts(options).to(device)
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    scores_NE = torch.randn(asked.tokens, asked.experts, device=device) + torch.linspace(
        0, 1, asked.experts, device=device
    )
    weight_NK, index_NK = scores_NE.softmax(-1).topk(asked.choices)
    x_ND = torch.randn(asked.tokens, asked.width, device=device, requires_grad=True)
    weight_NK.requires_grad_()
    args = (x_ND, index_NK, weight_NK)
    contenders = {
        "ours": contender(own, args, own, bf16),
        "split": contender(lambda *a: split(own, *a), args, own, bf16),
        "ours again": contender(own, args, own, bf16),
    }
    for run in contenders.values():
        run()
    seconds = interleave(contenders, asked.blocks)
    mean, low = ratio(seconds["split"], seconds["ours"])
    busiest = index_NK.flatten().bincount().max().item() * asked.experts / index_NK.numel()
    return {
        "device": str(device), "precision": "bf16" if bf16 else "fp32", "threads": torch.get_num_threads(),
        "ours_ms": round(1e3 * sum(seconds["ours"]) / asked.blocks, 1), "ratio": round(mean, 3),
        "ratio_low": round(low, 3), "aa": round(ratio(seconds["ours again"], seconds["ours"])[0], 3),
        "busiest": round(busiest, 2), **vars(asked),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in (
        ("tokens", 4096), ("width", 512), ("inner", 1024), ("experts", 8), ("choices", 2), ("blocks", 20)
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=number)
    asked = parser.parse_args()
    for bf16 in (False, True):
        print(json.dumps(measure(asked, bf16)))


if __name__ == "__main__":
    main()
