"""Ring attention: memory of a rank as ranks grow, and time against gathering all keys and values first.

    python benchmarks/context.py [--length 16384] [--ranks 1,2,4] [--blocks 20] [--starts 2] [--link 100mbit]

Memory: one forward and backward pass of attention over one row of `length`, by 1, 2 and 4 ranks; resident memory at its
peak above what a rank took before its inputs were made and after a small pass had loaded what is loaded once. Whichever
rank took most. --layers: so many one after the other (what one gives is the next one's queries, and some of its heads
the next one's keys and values): each keeps its own for backward, while only one at a time sends.

Time: two ranks, one thread each, ring against a baseline with the same head-tail cut, the same kernel and the same
masks that gathers K and V of all ranks, computes, and in backward gathers them again (as the ring sends them again:
keeping them would make every layer's memory that of whole rows) and adds up their gradients in fp32, each where it
belongs, by an all-to-all (gloo's reduce-scatter sends more). Each
contender has two processes of its own, and they take turns, block by block, one pass a block. waits: the ring, but
every message is waited for when it begins, so that nothing travels while a rank computes: what overlap is worth. A/A:
ring against ring in two more.

--link: all of it in a network namespace of its own, whose loopback `tc` limits to this rate: both ranks and both
directions share it. Nobody else's network is touched. Linux, iproute2, and the right to make namespaces.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.paired import ratio
from benchmarks.turns import over_starts, take_turns

from shoal.job import Layout
from shoal.launch.pool import Pool

CONTENDERS = ("ring", "gather", "waits", "ring again")
WARM_UP = 1024
_M_MMAP_THRESHOLD = -3  # glibc's <malloc.h>


def memory_main(seat: Any, **shape: Any) -> int:
    """Bytes at the peak of one pass of the ring, inputs included."""
    import torch

    from shoal import mesh as meshes

    torch.set_num_threads(1)
    # Freed tensors go back to the system at once, so that what is resident is what is in use, not glibc's holes.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    mesh = meshes.build(Layout(replicas=seat.world), seat)
    one_pass("ring", mesh, **shape | {"length": WARM_UP})()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    before = status("VmRSS")
    one_pass("ring", mesh, **shape)()
    peak = status("VmHWM")
    mesh.close()
    return peak - before


def status(field: str) -> int:
    """Bytes, as Linux counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def rank_main(seat: Any, contender: str, folder: str, **shape: Any) -> int:
    """One of a contender's two ranks: runs a pass whenever it is told to; the bytes that it has sent in one."""
    import torch
    import torch.distributed as dist

    from shoal import device
    from shoal import mesh as meshes

    torch.set_num_threads(1)
    mesh = meshes.build(Layout(replicas=seat.world), seat)
    device.keep_memory(mesh.device)
    run = one_pass(contender.split()[0], mesh, **shape)

    def timed() -> float:
        dist.barrier()
        start = time.perf_counter()
        run()
        slowest = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    timed()
    before = lo_bytes()
    timed()
    sent = lo_bytes() - before
    take_turns(folder, contender, seat.member, timed)
    mesh.close()
    return sent


def lo_bytes() -> int:
    """Sent over loopback so far, by everybody on it."""
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def one_pass(
    method: str, mesh: Any, length: int, documents: int, heads: int, key_heads: int, width: int, dtype: str, layers: int
) -> Callable[[], None]:
    """Forward and backward of attention over a row that begins a document every `documents` positions."""
    import torch

    from shoal.parallel.context import Context

    context = Context(mesh.everyone, "ring")
    document_1L = (torch.arange(length) // (documents or length))[None]
    generator = torch.Generator().manual_seed(mesh.rank)
    shapes = [(1, length // context.ranks, n, width) for n in (heads, key_heads, key_heads, heads)]
    *qkv, of_out = (torch.randn(s, generator=generator).to(getattr(torch, dtype)) for s in shapes)
    qkv = [x.requires_grad_() for x in qkv]
    makers = {"ring": lambda c, d: c.attend(d)(0), "gather": gathering, "waits": waiting}
    attention = makers[method](context, document_1L)

    def run() -> None:
        out = attention(*qkv)
        for _ in range(layers - 1):
            out = attention(out, out[:, :, :key_heads], out[:, :, -key_heads:])
        torch.autograd.grad(out, qkv, of_out)

    return run


def waiting(context: Any, document_BL: Any) -> Callable[..., Any]:
    from shoal.parallel import ring

    class Waiting(ring.Ring):
        def _begin(self, *args: Any) -> Any:
            works, arriving = super()._begin(*args)
            ring._wait(works)
            return works, arriving

    return Waiting(context.group, document_BL)


def gathering(context: Any, document_BL: Any) -> Callable[..., Any]:
    """The baseline: all-gather of K and V, then each query chunk against the chunks that it sees."""
    import torch
    import torch.distributed as dist
    from torch import Tensor

    from shoal.ops.partial_attention import BlockMask, add_gradients_, attend_, nothing_seen, rows
    from shoal.parallel.collectives import ALL_GATHER
    from shoal.parallel.ring import chunks

    ranks, size = context.ranks, document_BL.shape[1] // (2 * context.ranks)
    mask = BlockMask(document_BL, size)
    own = [(chunk, slice(half * size, (half + 1) * size)) for half, chunk in enumerate(chunks(context.rank, ranks))]
    everyone = [(chunk, r, half) for r in range(ranks) for half, chunk in enumerate(chunks(r, ranks))]

    def gathered(k: Tensor, v: Tensor) -> dict[int, Tensor]:
        """Each chunk's K and V of the whole row."""
        kv = torch.stack((k, v)).unflatten(2, (2, size)).movedim(2, 0).contiguous()
        all_kv = kv.new_empty(ranks, *kv.shape)
        ALL_GATHER(all_kv.flatten(0, 1), kv, group=context.group)
        return {chunk: all_kv[r, half] for chunk, r, half in everyone}

    class Gathering(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            result = nothing_seen(q)
            for chunk, kv in gathered(k, v).items():
                for queries, here in own:
                    attend_(rows(result, here), q[:, here], *kv, mask, queries, chunk)
            out = result[0].to(q.dtype)
            ctx.save_for_backward(q, k, v, out, result[1])
            return out

        @staticmethod
        def backward(ctx: Any, of_out: Tensor) -> tuple[Tensor | None, ...]:
            q, k, v, *result = ctx.saved_tensors
            of_q = torch.zeros_like(q, dtype=result[1].dtype)
            shape = (ranks, 2, 2, k.shape[0], size, *k.shape[2:])
            of_all = torch.zeros(shape, dtype=of_q.dtype)
            of_chunk = {chunk: of_all[r, half] for chunk, r, half in everyone}
            for chunk, kv in gathered(k, v).items():
                for queries, here in own:
                    sums = of_q[:, here], of_chunk[chunk][0], of_chunk[chunk][1]
                    qkv = q[:, here], kv[0], kv[1]
                    add_gradients_(sums, of_out[:, here], qkv, rows(tuple(result), here), mask, queries, chunk)
            arrived = torch.empty_like(of_all)
            dist.all_to_all_single(arrived, of_all, group=context.group)
            of_k, of_v = arrived.sum(0).movedim(0, 2).flatten(2, 3).to(k.dtype)
            return of_q.to(q.dtype), of_k, of_v

    return Gathering.apply


def memory(ranks: list[int], shape: dict[str, Any]) -> dict[int, int]:
    found = {}
    for world in ranks:
        with Pool(world) as pool:
            found[world] = max(pool.run("benchmarks.context:memory_main", world, timeout=3600, **shape))
    return found


def seconds(blocks: int, starts: int, shape: dict[str, Any]) -> dict[str, Any]:
    contenders = {name: {"contender": name, **shape} for name in CONTENDERS}
    columns, sent = over_starts("benchmarks.context:rank_main", contenders, blocks, starts)
    against, low = ratio(columns["gather"], columns["ring"], starts)
    waits, waits_low = ratio(columns["waits"], columns["ring"], starts)
    return {
        **{f"{name}_s": sum(columns[name]) / blocks for name in CONTENDERS[:3]},
        **{f"{name}_bytes": sent[name] for name in CONTENDERS[:3]},
        "ratio": against, "ratio_low": low, "waits": waits, "waits_low": waits_low,
        "aa": ratio(columns["ring again"], columns["ring"])[0], "blocks": blocks, "starts": starts,
    }  # fmt: skip


def limit(rate: str) -> None:
    """Starts this program again where loopback is limited; does not return."""
    own = ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    script = (
        f"ip link set lo up && tc qdisc add dev lo root tbf rate {rate} burst 256kb latency 400ms "
        '|| { echo "this machine does not let us limit a link" >&2; exit 2; }; exec "$@"'
    )
    os.environ["SHOAL_LIMITED"] = rate
    os.execvp(own[0], [*own, "sh", "-c", script, "sh", sys.executable, *sys.argv])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--documents", type=int, default=0, help="positions of a document; 0 = the row is one")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="of a head")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--ranks", default="1,2,4", help="whose memory is measured; empty = of none")
    parser.add_argument("--blocks", type=int, default=20, help="paired blocks; 0 = time is not measured")
    parser.add_argument("--starts", type=int, default=2, help="that the blocks are spread over")
    parser.add_argument("--link", default="", help="rate of the link between ranks, as tc writes it: 100mbit")
    parser.add_argument("--format", choices=["text", "json"], default="text")
    asked = parser.parse_args()
    if asked.link and os.environ.get("SHOAL_LIMITED") != asked.link:
        limit(asked.link)
    names = ("length", "documents", "heads", "key_heads", "width", "dtype", "layers")
    shape = {name: getattr(asked, name) for name in names}
    found: dict[str, Any] = {**shape, "link": asked.link}
    if asked.ranks:
        found["memory"] = memory([int(n) for n in asked.ranks.split(",")], shape)
    if asked.blocks:
        found |= seconds(asked.blocks, asked.starts, shape)
    print(json.dumps(found) if asked.format == "json" else table(found))


def table(found: dict[str, Any]) -> str:
    lines = []
    if "memory" in found:
        first_ranks, first = next(iter(found["memory"].items()))
        for ranks, peak in found["memory"].items():
            share = peak * ranks / (first * first_ranks)
            lines.append(f"{ranks} ranks: {peak / 2**20:8.1f} MiB a rank, ×{share:.3f} of an equal share")
    if "ratio" in found:
        lines += [
            f"{name:<7} {found[f'{name}_s']:.3f} s   {found[f'{name}_bytes'] / 2**20:.1f} MiB sent by both"
            for name in CONTENDERS[:3]
        ]
        lines.append(
            f"gather ÷ ring {found['ratio']:.3f} (≥ {found['ratio_low']:.3f})   waits ÷ ring {found['waits']:.3f} "
            f"(≥ {found['waits_low']:.3f})   A/A {found['aa']:.3f}   {found['blocks']} blocks"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
