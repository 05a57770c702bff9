"""Flat tensors in which gradients of several parameters lie side by side, as they go to other replicas."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor, nn


class Flat:
    """Where parameters lie in one flat tensor: the same in every step. It is told from others by identity.

    size: numbers in it. starts: parameter -> where what this rank has of it begins, row by row. gaps: first place and
    last one + 1 of stretches between where nothing lies, the last of them behind the end.
    """

    def __init__(self, places: Sequence[tuple[nn.Parameter, int, int]]):
        """places: parameter, its numbers here, and the room that it takes, one behind the other."""
        self.starts: dict[nn.Parameter, int] = {}
        self.gaps: list[tuple[int, int]] = []
        end = 0
        for parameter, numbers, room in places:
            self.starts[parameter] = end
            if numbers < room:
                self.gaps.append((end + numbers, end + room))
            end += room
        self.size = end
        self.gaps.append((end, sys.maxsize))

    @classmethod
    def of_numbers(cls, size: int) -> Flat:
        """One that holds no parameters' gradients, but so many numbers of something else."""
        flat = cls([])
        flat.size, flat.gaps = size, [(size, sys.maxsize)]
        return flat

    def zeros(self, numbers: int) -> Tensor:
        """So many, of the parameters' kind and on their device."""
        parameter = next(iter(self.starts))
        return torch.zeros(numbers, dtype=parameter.dtype, device=parameter.device)

    def clear_gaps(self, stretch_N: Tensor, first: int = 0) -> Tensor:
        """Zeros in the gaps of a stretch of such a tensor, which begins at place `first` and may reach beyond its
        end; in place."""
        for start, stop in self.gaps:
            stretch_N[max(start - first, 0) : max(stop - first, 0)] = 0
        return stretch_N


Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, shape)."""


def boxes(start: int, stop: int, shape: Sequence[int]) -> Iterator[Box]:
    """Those that, one behind the other, are the elements start … stop - 1 of a tensor of this shape, row by row.

    Of a matrix: the end of a row, whole rows, the beginning of a row.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row, rest = prod(shape[1:]), tuple(shape[1:])
    head, tail = -(-start // row), stop // row
    if head > tail:
        yield from _in_row(tail, start, stop, rest)
        return
    yield from _in_row(head - 1, start, head * row, rest)
    if head < tail:
        yield (head, *(0 for _ in rest)), (tail - head, *rest)
    yield from _in_row(tail, tail * row, stop, rest)


def _in_row(index: int, start: int, stop: int, shape: tuple[int, ...]) -> Iterator[Box]:
    first = index * prod(shape)
    for offsets, size in boxes(start - first, stop - first, shape):
        yield (index, *offsets), (1, *size)
