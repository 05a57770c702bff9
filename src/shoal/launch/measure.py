"""What ranks of this machine measure, all at once: products, attention, other operators, a block, collectives.

Everything as a step does it: the operators are those of `ops/`, in autocast where the precision has it, with gradients.
Written for CUDA as well, where it waits for the device after each call, and never run there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw

from shoal import device
from shoal import mesh as meshes
from shoal.job import Layout
from shoal.mesh import Mesh, Seat
from shoal.models.decoder import Block
from shoal.observe import machine
from shoal.ops.attention import causal_attend
from shoal.ops.norm import rms_norm
from shoal.ops.rope import frequencies, rotate, rotation
from shoal.parallel.collectives import ALL_GATHER, REDUCE_SCATTER
from shoal.planning.entry import EXCHANGES
from shoal.planning.local import HEADS, TINY, TINY_LENGTH
from shoal.training.precision import autocast, compute

PRECISIONS = ("fp32", "bf16")
# Sides of a product, and the most operations of one; small sides are those of heads and of few tokens.
_SIDES, _MOST_FLOPS = (16, 64, 256, 1024, 4096), 5e9
# Not in the grid: what an odd size costs is measured against the same shapes made even.
_ODD = ((511, 257, 129), (255, 1025, 257), (1023, 127, 511))
_LENGTHS, _HEAD_SIZES = (32, 128, 512, 1024), (32, 64, 128)
_NUMBERS = tuple(2**i for i in range(10, 25, 2))
_WIDTH, _HEAD = 256, 64
_WORDS = 4096
_BYTES = tuple(4**i for i in range(3, 13))  # 64 B to 16 MiB
# Most calls whose median counts. Parts of a rank's time: of products, attention, operators; collectives get the rest.
_MOST = 15
_SHARES = {"products": 0.35, "attention": 0.12, "operators": 0.25, "block": 0.03}

Call = Callable[[], Any]


def side(seat: Seat, until: float, spread: float) -> dict[str, Any]:
    """What one of the ranks finds: `side`, as planning.entry.Side is written, and what the device is.

    until: on the clock of `time.time`, when to have ended; spread: seconds that were given, of which the start of ranks
    has already taken some.
    """
    mesh = meshes.build(Layout(replicas=seat.world), seat, timeout=120)
    left = mesh.largest(min(spread, max(0.0, until - time.time())))
    alone = seat.world == 1
    of_each = left / (1.0 if not alone else sum(_SHARES.values()))
    precisions = {}
    for precision in PRECISIONS:
        meet(mesh)
        precisions[precision] = _precision(mesh, precision, of_each / len(PRECISIONS))
    rest = left - of_each * sum(_SHARES.values())
    exchanges = {} if alone else dict(_exchanges(mesh, max(0.0, rest)))
    one = torch.zeros(1, device=mesh.device)
    launch = timed(lambda: one.add_(1.0), mesh.device, 0.05, most=1000)
    found = {
        "ranks": seat.world, "threads": torch.get_num_threads(), "launch": launch, "precisions": precisions,
        "exchanges": exchanges,
    }  # fmt: skip
    gpu = mesh.device.type != "cpu"
    memory = torch.cuda.get_device_properties(mesh.device).total_memory if gpu else machine.memory()[0]
    facts = {"device": device.name(mesh.device), "kind": mesh.device.type, "devices": device.count(), "memory": memory}
    mesh.close()
    return {"side": found, **facts}


def meet(mesh: Mesh) -> None:
    """Waits for the other ranks, so that all compute at once."""
    mesh.largest(0.0)


def timed(call: Call, where: torch.device, seconds: float, most: int = _MOST) -> float:
    """Median seconds of a call: of as many as fit into `seconds`, one at least, after a first that does not count."""
    call()
    device.synchronize(where)
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while not taken or (len(taken) < most and time.perf_counter() < until):
        start = time.perf_counter()
        call()
        device.synchronize(where)
        taken.append(time.perf_counter() - start)
    return median(taken)


def _precision(mesh: Mesh, precision: str, seconds: float) -> dict[str, Any]:
    where = mesh.device
    dtype = compute(precision) or torch.float32
    products, odd = _products(where, dtype, _SHARES["products"] * seconds)
    meet(mesh)
    attention = _attention(where, dtype, _SHARES["attention"] * seconds)
    meet(mesh)
    operators = _operators(where, precision, _SHARES["operators"] * seconds)
    meet(mesh)
    block = _block(where, precision, _SHARES["block"] * seconds)
    found = {
        "products": products, "odd": odd, "operators": operators,
        "attention": attention[0], "attention_backward": attention[1],
    }  # fmt: skip
    return found | dict(zip(("block", "block_backward"), block, strict=True))


def _products(where: torch.device, dtype: torch.dtype, seconds: float) -> tuple[dict[str, Any], float]:
    """By (m, n, k), the smallest first, until the time is used up; and how many times as long an odd one takes."""

    def one(shape: tuple[int, ...], share: float) -> float:
        m, n, k = shape
        x_MK, w_NK = (torch.randn(rows, k, device=where).to(dtype) for rows in (m, n))
        return timed(lambda: F.linear(x_MK, w_NK), where, share)

    until = time.perf_counter() + seconds
    shapes: list[tuple[int, ...]] = sorted(product(_SIDES, repeat=3), key=lambda s: s[0] * s[1] * s[2])
    shapes = [s for s in shapes if 2.0 * s[0] * s[1] * s[2] <= _MOST_FLOPS]
    worth = sum(_worth(s) for s in shapes)
    taken: dict[tuple[int, ...], float] = {}
    ratios = []
    for odd in _ODD:
        share = 0.05 * seconds / 2 / len(_ODD)
        ratios.append(one(odd, share) / one(tuple(size + 1 for size in odd), share))
    for s in shapes:
        if taken and time.perf_counter() > until:
            break
        taken[s] = one(s, 0.9 * seconds * _worth(s) / worth)
    return {"shapes": [list(s) for s in taken], "seconds": list(taken.values())}, max(1.0, median(ratios))


def _worth(shape: tuple[int, ...]) -> float:
    """Part of the time that a shape gets: a large one takes longer."""
    m, n, k = shape
    return float((m * n * k) ** 0.5)


def _attention(where: torch.device, dtype: torch.dtype, seconds: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Forward and backward by (length, head size), of one sequence."""
    shapes = sorted(product(_LENGTHS, _HEAD_SIZES), key=lambda s: s[0] ** 2 * s[1])
    until, attend = time.perf_counter() + seconds, causal_attend()(0)
    kept: list[list[int]] = []
    forward: list[float] = []
    backward: list[float] = []
    for length, size in shapes:
        if kept and time.perf_counter() > until:
            break
        q, k, v = (
            torch.randn(1, length, HEADS, size, device=where).to(dtype).requires_grad_() for _ in range(3)
        )  # fmt: skip
        one, other = _both(partial(attend, q, k, v), [q, k, v], where, seconds / len(shapes))
        kept.append([length, size])
        forward.append(one)
        backward.append(other)
    return {"shapes": kept, "seconds": forward}, {"shapes": kept, "seconds": backward}


def _both(call: Call, inputs: list[Tensor], where: torch.device, seconds: float) -> tuple[float, float]:
    """Median seconds of a call, and of its gradients."""
    forward: list[float] = []
    backward: list[float] = []
    until = time.perf_counter() + seconds
    out = call()
    gradient = torch.randn_like(out)
    while len(forward) < 2 or (len(forward) < _MOST and time.perf_counter() < until):
        start = time.perf_counter()
        out = call()
        device.synchronize(where)
        middle = time.perf_counter()
        torch.autograd.grad(out, inputs, gradient)
        device.synchronize(where)
        forward.append(middle - start)
        backward.append(time.perf_counter() - middle)
    # The first is still slow.
    return median(forward[1:]), median(backward[1:])


def _operators(where: torch.device, precision: str, seconds: float) -> dict[str, dict[str, list[float]]]:
    """By the numbers that each works on. The largest are left out where the time is used up."""
    found: dict[str, dict[str, list[float]]] = {}
    until, each = time.perf_counter() + seconds, seconds / len(_NUMBERS) / 11

    def note(name: str, numbers: int, taken: float) -> None:
        line = found.setdefault(name, {"sizes": [], "seconds": []})
        line["sizes"].append(float(numbers))
        line["seconds"].append(taken)

    for numbers in _NUMBERS:
        if found and time.perf_counter() > until:
            break
        with autocast(precision, where):
            for name, (call, inputs) in _with_gradients(numbers, where, precision).items():
                forward, backward = _both(call, inputs, where, each)
                note(name, numbers, forward)
                note(f"{name}.backward", numbers, backward)
        for name, alone in _alone(numbers, where).items():
            note(name, numbers, timed(alone, where, each))
    return found


def _with_gradients(numbers: int, where: torch.device, precision: str) -> dict[str, tuple[Call, list[Tensor]]]:
    """Name -> operator, what it has gradients of."""
    dtype = compute(precision) or torch.float32
    rows = numbers // _WIDTH

    def some(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=where, dtype=of).requires_grad_()

    x, y, weight = some(rows, _WIDTH), some(rows, _WIDTH), some(_WIDTH)
    a, b = some(rows, _WIDTH, of=dtype), some(rows, _WIDTH, of=dtype)
    length = numbers // _HEAD
    turned = some(1, length, 1, _HEAD, of=dtype)
    positions = torch.arange(length, device=where)[None]
    cos, sin = rotation(positions, frequencies(_HEAD, 1e4, "", where), torch.float32)
    return {
        "norm": (lambda: rms_norm(x, weight.to(dtype), 1e-5, dtype), [x, weight]),
        "gate": (lambda: F.silu(a) * b, [a, b]),
        "rotate": (lambda: rotate(turned, cos, sin), [turned]),
        # A stream that goes two ways gets two gradients, which are added.
        "add": (lambda: x + y, [x, y]),
    }


def _alone(numbers: int, where: torch.device) -> dict[str, Call]:
    """Operators that nothing differentiates: passes over memory, the loss of a tile, the update."""
    x, y, z = (torch.rand(numbers, device=where) for _ in range(3))
    words = min(_WORDS, numbers)
    tile = x.view(-1, words)
    label = torch.zeros(len(tile), 1, dtype=torch.int64, device=where)
    value, moment, square = (torch.zeros(numbers, device=where) for _ in range(3))
    count, ones = torch.ones((), device=where), torch.ones(len(tile), 1, device=where)

    def loss() -> None:
        tile.gather(1, label)
        tile.sub_(tile.amax(-1, keepdim=True)).exp_().sum(-1, keepdim=True)
        tile.mul_(ones)
        tile.scatter_add_(1, label, -ones)

    def update() -> None:
        torch._foreach_norm([z])
        torch._foreach_mul_([z], 1.0)
        adamw(
            [value], [z], [moment], [square], [], [count], fused=True, amsgrad=False, beta1=0.9, beta2=0.95, lr=1e-3,
            weight_decay=0.1, eps=1e-8, maximize=False,
        )  # fmt: skip

    return {
        "copy": lambda: y.copy_(z), "scale": lambda: y.mul_(1.0), "cast": lambda: z.bfloat16(), "loss": loss,
        "update": update,
    }  # fmt: skip


def _block(where: torch.device, precision: str, seconds: float) -> tuple[float, float]:
    """Seconds of a block so small that its operators take next to nothing but what it takes to call them: forward,
    backward."""
    block = Block(TINY, 0).to(where)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, TINY_LENGTH, TINY.hidden_size, device=where, requires_grad=True)
    positions = torch.arange(TINY_LENGTH, device=where)[None]
    cos, sin = rotation(positions, frequencies(TINY.head_size, 1e4, "", where), torch.float32)
    attend = causal_attend()(0)
    with autocast(precision, where):
        return _both(lambda: block(x, cos, sin, attend), [x, *block.parameters()], where, seconds)


def _exchanges(mesh: Mesh, seconds: float) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Collectives of all ranks by bytes; a message from the first rank to the last one and back, halved."""
    for kind in EXCHANGES:
        sizes: list[float] = []
        taken: list[float] = []
        begin, share = time.perf_counter(), seconds / 4
        for size in _BYTES:
            # All stop at the same size.
            if len(sizes) > 2 and mesh.largest(time.perf_counter() - begin) > share:
                break
            sizes.append(float(size))
            taken.append(_exchange(mesh, kind, size, share / len(_BYTES)))
        yield kind, {"sizes": sizes, "seconds": taken}


def _exchange(mesh: Mesh, kind: str, size: int, seconds: float) -> float:
    call = _collective(mesh, kind, size)
    call()

    def once() -> float:
        start = time.perf_counter()
        call()
        device.synchronize(mesh.device)
        return time.perf_counter() - start

    first = mesh.largest(once())
    times = max(1, min(_MOST, int(seconds / max(first, 1e-9))))
    return mesh.largest(median([once() for _ in range(times)])) / (2 if kind == "message" else 1)


def _collective(mesh: Mesh, kind: str, size: int) -> Call:
    number, ranks, group = size // 4, mesh.world, mesh.everyone
    part = max(1, number // ranks)
    x, own, whole = (torch.zeros(n, device=mesh.device) for n in (number, part, part * ranks))
    if kind == "all_reduce":
        return lambda: dist.all_reduce(x, group=group)
    if kind == "all_gather":
        return lambda: ALL_GATHER(whole, own, group=group)
    if kind == "reduce_scatter":
        return lambda: REDUCE_SCATTER(own, whole, group=group)
    last = ranks - 1

    def there_and_back() -> None:
        if mesh.rank == 0:
            dist.send(x, last)
            dist.recv(x, last)
        elif mesh.rank == last:
            dist.recv(x, 0)
            dist.send(x, 0)

    return there_and_back
