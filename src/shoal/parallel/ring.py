"""Ring attention: queries stay, keys and values go round (Liu et al. 2023, "Ring Attention with Blockwise
Transformers for Near-Infinite Context", arXiv:2310.01889).

A row is cut in 2n equal chunks; rank r of n holds chunk r and chunk 2n − 1 − r (head and tail, as in Llama 3:
Grattafiori et al. 2024, section 3.3.2, arXiv:2407.21783), so that under a causal mask all have the same to do. A rank
computes with the head of rank r − d from step 2d on and with its tail in step 2d + 1, one pair of chunks a step, and in
each step one chunk arrives and one travels on. Backward sends keys and values round once more, and behind them the sums
of their gradients.

A chunk visits only ranks that see some of it, in the order of the ring. Where the rank before one does not see it, it
comes straight from its owner, and where the next does not, its gradient goes straight home: nobody keeps it for others.
Every rank derives all messages from the documents. Both ends of a message begin it in the same step, and messages
between two ranks have the same order at both: NCCL needs no more, gloo less.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from shoal.operations import noted
from shoal.ops.partial_attention import BlockMask, Result, Three, add_gradients_, attend_, nothing_seen, rows

Pair = tuple[Tensor, Tensor]
"""Keys and values of a chunk, (B, C, K, D) each, or their gradients."""


class Message(NamedTuple):
    """One chunk's keys and values, or their gradients' sum, from rank to rank. home: the target owns the chunk."""

    chunk: int
    source: int
    target: int
    home: bool = False


def chunks(rank: int, ranks: int) -> tuple[int, int]:
    """The numbers of the two chunks that a rank holds: head and tail."""
    return rank, 2 * ranks - 1 - rank


def owner(chunk: int, ranks: int) -> int:
    return min(chunk, 2 * ranks - 1 - chunk)


def routes(seers: list[dict[int, int]]) -> tuple[list[list[Message]], list[list[Message]]]:
    """(messages of keys and values, messages of gradients) that begin in each of 2n + 1 steps.

    seers: for each of 2n chunks the ranks, other than its owner, that see some of it, and in how many steps (1 or 2)
    they compute with it. It is sent in the step before the first, and its gradient in the step after the last.
    """
    ranks = len(seers) // 2
    outward: list[list[Message]] = [[] for _ in range(2 * ranks + 1)]
    homeward: list[list[Message]] = [[] for _ in range(2 * ranks + 1)]
    for chunk, seen_by in enumerate(seers):
        home = owner(chunk, ranks)
        for distance in range(1, ranks):
            here, before, after = ((home + distance + by) % ranks for by in (0, -1, 1))
            if here in seen_by:
                step, ends = 2 * distance + chunk // ranks, after not in seen_by
                outward[step - 1].append(Message(chunk, before if before in seen_by else home, here))
                homeward[step + seen_by[here]].append(Message(chunk, here, home if ends else after, home=ends))
    return outward, homeward


class Ring:
    """Attention of one micro-batch, for all layers. Every rank of the group makes it from the same documents."""

    def __init__(self, group: dist.ProcessGroup, document_BL: Tensor):
        """document_BL: integers, of the whole rows; 2n divides L."""
        self.group, self.ranks, self.rank = group, group.size(), group.rank()
        self.mask = BlockMask(document_BL, document_BL.shape[1] // (2 * self.ranks))
        self._work = [pairs for distance in range(self.ranks) for pairs in self._pairs(self.rank, distance)]
        self.outward, self.homeward = routes([self._seers(chunk) for chunk in range(2 * self.ranks)])

    def __call__(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Tensor:
        """out_BTHD for this rank's two chunks, from its own q, k and v of one dtype. All ranks call it together."""
        return _RingAttention.apply(q_BTHD, k_BTKD, v_BTKD, self)

    def forward(self, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor) -> Result:
        """(out_BTHD in the dtype of q, lse_BHT), over all keys that are seen."""
        so_far = nothing_seen(q_BTHD)
        own = self._own(k_BTKD, v_BTKD)
        held: dict[int, Pair] = {}
        for step, pairs in enumerate(self._work):
            works, arriving = self._begin(self.outward[step], own | held, own[self.rank][0])
            for queries, chunk in pairs:
                here = self._halves(q_BTHD)[queries]
                attend_(rows(so_far, here), q_BTHD[:, here], *(own | held)[chunk], self.mask, queries, chunk)
            _wait(works)
            held = self._kept(held, step) | {message.chunk: pair for message, pair in arriving}
        out_BTHD, lse_BHT = so_far
        return out_BTHD.to(q_BTHD.dtype), lse_BHT

    def backward(self, of_out_BTHD: Tensor, qkv: Three, result: Result) -> Three:
        """The gradients of this rank's q, k and v, wide. Sums are taken in the order of the ring, run after run."""
        of_q_BTHD, of_k_BTKD, of_v_BTKD = (torch.zeros_like(x, dtype=result[1].dtype) for x in qkv)
        own, of_own = self._own(*qkv[1:]), self._own(of_k_BTKD, of_v_BTKD)
        held: dict[int, Pair] = {}
        sums: dict[int, Pair] = {}
        for step, pairs in enumerate([*self._work, []]):
            works, arriving = self._begin(self.outward[step], own | held, own[self.rank][0])
            more_works, coming = self._begin(self.homeward[step], sums, of_own[self.rank][0])
            sums = {chunk: pair for chunk, pair in sums.items() if chunk not in self._leaving(step)}
            for queries, chunk in pairs:
                if chunk not in of_own | sums:
                    of_k_BCKD, of_v_BCKD = of_own[self.rank]
                    sums[chunk] = torch.zeros_like(of_k_BCKD), torch.zeros_like(of_v_BCKD)
                here = self._halves(of_q_BTHD)[queries]
                of_qkv = of_q_BTHD[:, here], *(of_own | sums)[chunk]
                given = of_out_BTHD[:, here], (qkv[0][:, here], *(own | held)[chunk]), rows(result, here)
                add_gradients_(of_qkv, *given, self.mask, queries, chunk)
            _wait(works)
            _wait(more_works)
            for message, pair in coming:
                chunk = chunks(self.rank, self.ranks)[message.chunk // self.ranks] if message.home else message.chunk
                _add_(of_own if message.home else sums, chunk, pair)
            held = self._kept(held, step) | {message.chunk: pair for message, pair in arriving}
        return of_q_BTHD, of_k_BTKD, of_v_BTKD

    def _pairs(self, rank: int, distance: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """(chunk of queries, chunk of keys) that a rank computes in the two steps of that distance: of the head's and
        the tail's, or, where it sees no tail, both of the head's one after the other."""
        head, tail = chunks((rank - distance) % self.ranks, self.ranks)
        pairs = [(q, k) for k in (head, tail) for q in chunks(rank, self.ranks) if self.mask.sees(q, k)]
        of_head = sum(k == head for _, k in pairs)
        first = 1 if distance == 0 or of_head == len(pairs) else of_head
        return pairs[:first], pairs[first:]

    def _seers(self, chunk: int) -> dict[int, int]:
        home, half = owner(chunk, self.ranks), chunk // self.ranks
        found = {}
        for distance in range(1, self.ranks):
            rank = (home + distance) % self.ranks
            steps = [any(k == chunk for _, k in pairs) for pairs in self._pairs(rank, distance)]
            if any(steps):
                found[rank] = 2 - half if steps[1] else 1
        return found

    def _kept(self, held: dict[int, Pair], step: int) -> dict[int, Pair]:
        """Without what has been computed with and sent on: only what first was in this step."""
        chunk = chunks((self.rank - step // 2) % self.ranks, self.ranks)[step % 2]
        return {chunk: held[chunk]} if chunk in held else {}

    def _leaving(self, step: int) -> set[int]:
        return {message.chunk for message in self.homeward[step] if message.source == self.rank}

    def _halves(self, x_BTHD: Tensor) -> dict[int, slice]:
        """This rank's chunks, and where they lie in its tensors."""
        head, tail = chunks(self.rank, self.ranks)
        size = self.mask.chunk
        assert x_BTHD.shape[1] == 2 * size, f"{x_BTHD.shape[1]} positions of a rank, expected two chunks of {size}"
        return {head: slice(0, size), tail: slice(size, 2 * size)}

    def _own(self, k_BTKD: Tensor, v_BTKD: Tensor) -> dict[int, Pair]:
        """This rank's chunks of both; views."""
        return {chunk: (k_BTKD[:, here], v_BTKD[:, here]) for chunk, here in self._halves(k_BTKD).items()}

    def _begin(
        self, messages: list[Message], pairs: dict[int, Pair], like: Tensor
    ) -> tuple[list[dist.Work], list[tuple[Message, Pair]]]:
        """Begins what this rank sends (of `pairs`, by chunk) and receives (K and V as `like`): (works to wait for,
        what will arrive)."""
        operations, arriving = [], []
        for message in messages:
            if message.source == self.rank:
                for tensor in pairs[message.chunk]:
                    operation = dist.P2POp(dist.isend, tensor.contiguous(), group=self.group, group_peer=message.target)
                    operations.append(operation)
            elif message.target == self.rank:
                pair = like.new_empty(like.shape), like.new_empty(like.shape)
                for tensor in pair:
                    operation = dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=message.source)
                    operations.append(operation)
                arriving.append((message, pair))
        return (dist.batch_isend_irecv(noted(operations)) if operations else []), arriving


def _add_(sums: dict[int, Pair], chunk: int, pair: Pair) -> None:
    if chunk not in sums:
        sums[chunk] = pair
        return
    for total, part in zip(sums[chunk], pair, strict=True):
        total += part


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHD: Tensor, k_BTKD: Tensor, v_BTKD: Tensor, ring: Ring) -> Tensor:
        out_BTHD, lse_BHT = ring.forward(q_BTHD, k_BTKD, v_BTKD)
        ctx.save_for_backward(q_BTHD, k_BTKD, v_BTKD, out_BTHD, lse_BHT)
        ctx.ring = ring
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out_BTHD: Tensor) -> tuple[Tensor | None, ...]:
        *qkv, out_BTHD, lse_BHT = ctx.saved_tensors
        gradients = ctx.ring.backward(of_out_BTHD, tuple(qkv), (out_BTHD, lse_BHT))
        return *(g.to(of_out_BTHD.dtype) for g in gradients), None


def _wait(works: list[dist.Work]) -> None:
    """Until they are done (on a GPU: until what is queued from now on comes after them). Lets go of them, and so of the
    memory of what they sent."""
    while works:
        work = works.pop(0)
        work.wait()
