"""Ranks of test_context: attention over rows that are spread over them, against the same rows in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.mesh import Seat
from shoal.ops import partial_attention
from shoal.ops.attention import document_attend
from shoal.parallel import ring, ulysses
from shoal.parallel.context import Context

Four = tuple[Tensor, ...]
"""out and the gradients of q, k and v."""


@contextmanager
def group(seat: Seat, tile: int = 3) -> Iterator[dist.ProcessGroup]:
    """All ranks; tiles so small that a chunk has several, and the last of them is a smaller one."""
    mesh = meshes.build(Layout(replicas=seat.world), seat, timeout=60)
    try:
        with patch.multiple(partial_attention, _TILE=tile, _WIDE_TILE=2 * tile):
            yield mesh.everyone
    finally:
        mesh.close()


def inputs(
    length: int, rows: int, heads: int, key_heads: int, cuts: list[list[int]], seed: int = 0, width: int = 6, **_: Any
) -> tuple[Tensor, list[Tensor]]:
    """(document_BL, [q, k, v, gradient of out]), whole. cuts: positions at which a row's documents begin."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, length, n, width) for n in (heads, key_heads, key_heads, heads)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    document_BL = torch.zeros(rows, length, dtype=torch.int32)
    for row, starts in enumerate(cuts):
        for start in starts:
            document_BL[row, start:] += 1
    return document_BL, tensors


def results(attention: Callable[..., Tensor], tensors: list[Tensor]) -> Four:
    *qkv, of_out = tensors
    qkv = [x.detach().clone().requires_grad_() for x in qkv]
    out = attention(*qkv)
    return (out.detach(), *torch.autograd.grad(out, qkv, of_out))


def here(context: Context, document_BL: Tensor, tensors: list[Tensor]) -> Four:
    return results(context.attend(document_BL)(0), [context.cut(x) for x in tensors])


def distance(context: Context, ours: Four, whole: Four) -> float:
    """The largest difference of out or a gradient from this rank's part of the whole, relative to the largest value of
    each of the whole (1, where that is less: gradients of a document of one token are 0)."""
    if not all(torch.isfinite(x).all() for x in ours):
        return 1e300
    pairs = [(a, context.cut(b), b.abs().max().clamp(min=1.0)) for a, b in zip(ours, whole, strict=True)]
    return max(((a - b).abs().max() / scale).item() for a, b, scale in pairs)


def agree(seat: Seat, method: str, cases: list[dict[str, Any]]) -> list[float]:
    """Distance of this rank's part from the same part of one process's, for each case."""
    found = []
    with group(seat) as everyone:
        context = Context(everyone, method)
        for case in cases:
            document_BL, tensors = inputs(**case)
            whole = results(document_attend(document_BL)(0), tensors)
            found.append(distance(context, here(context, document_BL, tensors), whole))
    return found


def repeats(seat: Seat, method: str, case: dict[str, Any]) -> bool:
    """Whether two passes give the same to the last bit."""
    with group(seat) as everyone:
        context = Context(everyone, method)
        document_BL, tensors = inputs(**case)
        first, second = (here(context, document_BL, [x.float() for x in tensors]) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def narrow(seat: Seat, method: str, dtype: str, case: dict[str, Any], autocast: bool = False) -> list[list[float]]:
    """[ours, one process's] distance of out and each gradient from float64, by norm, where inputs are of `dtype`."""
    narrow = getattr(torch, dtype)
    with group(seat) as everyone:
        context = Context(everyone, method)
        document_BL, tensors = inputs(**case)
        given = [x.to(narrow) for x in tensors]
        truth = results(document_attend(document_BL)(0), [x.double() for x in given])
        if autocast:
            given = [x.float() for x in given[:3]] + given[3:]
        with torch.autocast("cpu", narrow, enabled=autocast):
            ours = here(context, document_BL, given)
            plain = results(document_attend(document_BL)(0), given)
        assert ours[0].dtype == plain[0].dtype == narrow
        assert [x.dtype for x in ours] == [x.dtype for x in plain]
        true = [context.cut(x) for x in truth]
        plain = tuple(context.cut(x) for x in plain)
    return [[((a - b).norm() / b.norm()).item() for a, b in zip(them, true, strict=True)] for them in (ours, plain)]


def sent(seat: Seat, case: dict[str, Any], dtype: str = "float32") -> dict[str, Any]:
    """Bytes that this rank sends forward and backward, and the pairs of chunks (queries, keys) that it computes."""
    counted: list[int] = []
    pairs: list[tuple[int, int]] = []
    original, attend_ = dist.batch_isend_irecv, ring.attend_

    def count(operations: list[dist.P2POp]) -> list[dist.Work]:
        counted.extend(o.tensor.nbytes for o in operations if o.op is dist.isend)
        return original(operations)

    def note(*args: Any) -> None:
        pairs.append(args[-2:])
        attend_(*args)

    with group(seat, tile=64) as everyone:
        context = Context(everyone, "ring")
        document_BL, tensors = inputs(**case)
        *qkv, of_out = (context.cut(x).to(getattr(torch, dtype)).requires_grad_() for x in tensors)
        attention = context.attend(document_BL)(0)
        with patch.object(dist, "batch_isend_irecv", count), patch.object(ring, "attend_", note):
            out = attention(*qkv)
            forward = sum(counted)
            torch.autograd.grad(out, qkv, of_out.detach())
        mask = attention.args[0].mask
        useful = [pair for pair in pairs if mask.tiles(*pair)]
    return {"forward": forward, "backward": sum(counted) - forward, "pairs": len(useful)}


def events(seat: Seat, case: dict[str, Any]) -> list[str]:
    """What the ring does in forward and in backward: m(essages begin), c(ompute), w(ait), one letter each."""
    happened: list[str] = []

    def noting(letter: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any) -> Any:
            happened.append(letter)
            return original(*args)

        return noted

    letters = {"attend_": "c", "add_gradients_": "c", "_wait": "w"}
    watched = {name: noting(letter, getattr(ring, name)) for name, letter in letters.items()}
    with group(seat) as everyone, patch.multiple(ring, **watched):
        ring_of = ring.Ring(everyone, inputs(**case)[0])
        ring_of._begin = noting("m", ring_of._begin)
        context = Context(everyone, "ring")
        *qkv, of_out = (context.cut(x).requires_grad_() for x in inputs(**case)[1])
        out = ring_of(*qkv)
        forward = "".join(happened)
        torch.autograd.grad(out, qkv, of_out.detach())
    return [forward, "".join(happened).removeprefix(forward)]


def exchanged(seat: Seat, case: dict[str, Any]) -> list[int]:
    """Bytes that this rank sends to others in Ulysses' forward and backward."""
    counted: list[int] = []
    original = dist.all_to_all_single

    def count(arrived: Tensor, sent: Tensor, **options: Any) -> Any:
        counted.append(sent.nbytes * (seat.world - 1) // seat.world)
        return original(arrived, sent, **options)

    with group(seat) as everyone, patch.object(dist, "all_to_all_single", count):
        context = Context(everyone, "ulysses")
        document_BL, tensors = inputs(**case)
        here(context, document_BL, [x.float() for x in tensors])
    return [sum(counted[:2]), sum(counted[2:])]


def compiled(seat: Seat, method: str, case: dict[str, Any]) -> list[float]:
    """Distances of a compiled function around the attention, over micro-batches with documents of their own; last,
    how many graphs were compiled."""
    from torch._dynamo.utils import counters

    def block(q: Tensor, k: Tensor, v: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        return attention(q * 2, k + 1, v * 3).sin()

    torch._dynamo.reset()
    counters.clear()
    fast = torch.compile(block, backend="aot_eager")
    found = []
    with group(seat) as everyone:
        context = Context(everyone, method)
        for cut in (5, 11, 17):
            document_BL, tensors = inputs(**case | {"cuts": [[cut]] * case["rows"]})
            attend, whole = context.attend(document_BL), document_attend(document_BL)(0)
            ours = results(lambda *x, a=attend: fast(*x, a(0)), [context.cut(x) for x in tensors])
            theirs = results(lambda *x, a=whole: block(*x, a), tensors)
            found.append(distance(context, ours, theirs))
    return [*found, counters["stats"]["unique_graphs"]]


def bug(seat: Seat, name: str, method: str, case: dict[str, Any]) -> float:
    """Distance with one of `plant`'s bugs."""
    with plant(name):
        return agree(seat, method, [case])[0]


def plant(name: str) -> Any:
    if name == "off by one block":  # a rank takes what came for the block after
        seen = ring.attend_

        def off(*args: Any) -> None:
            *rest, mask, queries, keys = args
            chunks = mask.document_BL.shape[1] // mask.chunk
            seen(*rest, mask, queries, (keys + 1) % chunks)

        return patch.object(ring, "attend_", off)
    if name == "no merge":  # the last part replaces those before it

        def replace(result: partial_attention.Result, more: partial_attention.Result) -> None:
            for mine, new in zip(result, more, strict=True):
                mine.copy_(new)

        return patch.object(partial_attention, "merge_", replace)
    if name == "local positions":  # masks as if a rank's chunks were the first two of the row

        def local(mask: Any, queries: int, keys: int) -> list[partial_attention.Tile]:
            chunks = mask.document_BL.shape[1] // mask.chunk
            return tiles(mask, int(queries >= chunks // 2), int(keys >= chunks // 2))

        tiles = partial_attention.BlockMask.tiles
        return patch.object(partial_attention.BlockMask, "tiles", local)
    if name == "wrong home":  # the gradients of keys and values come home to the neighbour

        def astray(seers: list[dict[int, int]]) -> Any:
            outward, homeward = routes(seers)
            ranks = len(seers) // 2
            return outward, [[m._replace(target=(m.target + m.home) % ranks) for m in step] for step in homeward]

        routes = ring.routes
        return patch.object(ring, "routes", astray)
    if name == "own lse":  # backward with the lse of the own block's keys alone
        add = ring.add_gradients_

        def forgets(sums: Any, of_out: Tensor, qkv: Any, result: Any, mask: Any, queries: int, keys: int) -> None:
            alone = partial_attention.nothing_seen(qkv[0])
            partial_attention.attend_(alone, *qkv, mask, queries, keys)
            add(sums, of_out, qkv, (result[0], alone[1].clamp(min=-1e30)), mask, queries, keys)

        return patch.object(ring, "add_gradients_", forgets)
    if name == "rows in the order of heads":  # pieces that came are taken for the next rank's
        exchange = ulysses.Ulysses._exchange
        return patch.object(ulysses.Ulysses, "_exchange", lambda self, x: exchange(self, x).roll(1, 0))
    if name == "first copy":  # only one of the gradients of a key head that was sent to several ranks
        return patch.object(
            ulysses.Ulysses, "add_up", lambda self, x, heads: x.unflatten(2, (heads, -1)).select(3, 0).contiguous()
        )
    assert name == "", name
    return patch.object(ring, "routes", ring.routes)
