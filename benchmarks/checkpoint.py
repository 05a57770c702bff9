"""How long saving holds training up (a copy into shared memory), beside how long the writing behind it takes.

python benchmarks/checkpoint.py --gib 1 --saves 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from shoal import checkpoint, device
from shoal.checkpoint import Saver
from shoal.shard import Shard, State

# A matrix of a small model; the state is many of these.
SHAPE = (1024, 1024)


def measure(gib: float, saves: int, root: Path) -> dict[str, float]:
    """Seconds; the first save also allocates the shared memory, so that it is told apart."""
    where = device.of_rank(0)
    count = max(1, int(gib * 2**30) // (4 * SHAPE[0] * SHAPE[1]))
    tensors = [torch.randn(SHAPE, device=where) for _ in range(count)]
    state = State([Shard(f"layers.{i}.weight", SHAPE, (0, 0), tensor) for i, tensor in enumerate(tensors)])
    copies, writes = [], []
    with Saver(root, 0, 1, 1, nonce="benchmark") as saver:
        for step in range(1, saves + 2):
            pending = saver.save(state, step)
            pending.wait()
            if pending.error:
                raise pending.error
            copies.append(pending.copy_seconds)
            writes.append(pending.write_seconds or 0.0)
    start = time.perf_counter()
    newest = checkpoint.newest(root, print)
    verified = time.perf_counter()
    assert newest is not None
    checkpoint.load(newest, state.shards, verified=True)
    return {
        "gib": sum(tensor.nbytes for tensor in tensors) / 2**30,
        "stall_first": copies[0],
        "stall": statistics.median(copies[1:]),
        "write": statistics.median(writes[1:]),
        "verify": verified - start,
        "load": time.perf_counter() - verified,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=0.25, help="size of the state, GiB of fp32 (default 0.25)")
    parser.add_argument("--saves", type=int, default=5, help="saves of which the median is printed (default 5)")
    parser.add_argument("--folder", type=Path, help="file system to write to (default: that of temporary files)")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found = measure(options.gib, options.saves, Path(folder))
    if options.format == "json":
        print(json.dumps(found))
        return
    first, stall, write = found["stall_first"], found["stall"], found["write"]
    print(f"{found['gib']:.2f} GiB from {device.kind()}, {options.saves} saves, median:")
    print(f"  stall of training (copy)   {stall:8.3f} s   the first time {first:.3f} s")
    print(f"  written behind it          {write:8.3f} s   {write / stall:.1f} × the stall")
    print(f"  resume: verify, then load  {found['verify']:8.3f} s + {found['load']:.3f} s")


if __name__ == "__main__":
    main()
