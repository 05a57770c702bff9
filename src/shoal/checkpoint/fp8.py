"""Weights that are stored in fp8 with one scale for each block of them (DeepSeek-V3, section 3.3.2, arXiv:2412.19437),
as numbers again.

A weight of type F8_E4M3 has beside it `<name>_scale_inv`, one number for each block of, say, 128 × 128 elements; blocks
at the end of a row or column may be smaller. What is meant is their product, computed in float32 as in DeepSeek's own
code. Blocks are counted from the start of the whole tensor, whatever part of it is wanted.
"""

from __future__ import annotations

from functools import cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.checkpoint import hf_folder
from shoal.checkpoint.blocks import BLOCK, ITEM_BYTES, Box, read, whole
from shoal.checkpoint.manifest import Tensor
from shoal.checkpoint.safetensors import read_header
from shoal.errors import ModelError

if TYPE_CHECKING:
    import torch

DTYPE = "F8_E4M3"
# Elements at a time, which are 4 bytes each once they are numbers.
LIMIT = BLOCK // 4


def check(
    path: Path,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    scales: Scales | None,
) -> None:
    """As `hf_folder.check`; a matrix may be in fp8, and then has scales, where the folder has them."""
    known = hf_folder.DTYPES if scales is None or len(expected) != 2 else (*hf_folder.DTYPES, DTYPE)
    hf_folder.check(path, name, dtype, shape, expected, known)
    if scales is None:
        return
    if dtype == DTYPE:
        scales.find(name, shape)
    elif f"{name}_scale_inv" in scales.files:
        what = f"tensor '{name}' has type {dtype}, and scales beside it, which only {DTYPE} has"
        raise ModelError(what, where=str(path), fix="fetch the folder again")


class Scales:
    """The scales of a folder. Of them, too, only those are read that are needed."""

    def __init__(self, folder: Path, files: dict[str, str], block: tuple[int, int]):
        """files: tensor name -> file. block: rows and columns that share a scale."""
        self.folder, self.files, self.block = folder, files, block
        self._header = cache(lambda file: read_header(folder / file))

    def find(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Those of a weight of this shape. Raises ModelError where they are missing, or are not what blocks need."""
        scale = f"{name}_scale_inv"
        if scale not in self.files:
            raise hf_folder.missing(self.folder, scale)
        file = self.files[scale]
        found = self._header(file).get(scale)
        if found is None:
            raise hf_folder.missing(self.folder, scale)
        blocks = tuple(-(-size // block) for size, block in zip(shape, self.block, strict=True))
        hf_folder.check(self.folder / file, scale, found.dtype, found.shape, blocks)
        return found

    def dequantise(self, scale: Tensor, box: Box, numbers: torch.Tensor) -> torch.Tensor:
        """The numbers of a box of a weight times their scales, float32 on the CPU.

        scale: as found. numbers: of the box's shape, float8_e4m3fn.
        """
        import torch

        first = tuple(at // block for at, block in zip(box.offsets, self.block, strict=True))
        (rows, columns) = (
            torch.arange(at, at + size) // block - begin
            for at, size, block, begin in zip(*box, self.block, first, strict=True)
        )
        few = self._read(scale, Box(first, (int(rows[-1]) + 1, int(columns[-1]) + 1)))
        return numbers.float().mul_(few.index_select(0, rows).index_select(1, columns))

    def _read(self, scale: Tensor, box: Box) -> torch.Tensor:
        import torch

        from shoal.checkpoint.pack import DTYPES

        assert scale.pieces[0].offsets == whole(scale).offsets
        item = ITEM_BYTES[scale.dtype]
        view = memoryview(bytearray(prod(box.shape) * item))
        read(self.folder, scale.pieces[0], box, item, view, box)
        return torch.frombuffer(view, dtype=DTYPES[scale.dtype]).view(box.shape).float()
