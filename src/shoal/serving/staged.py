"""Text from a model that ranks share: each holds its pieces of the weights and of the cache, none the whole model.

Hidden states go through the stages of a pipeline as in training, wherever its schedule puts them. On the tensor axis
every rank has all positions, since one new token cannot be cut: two all-reduces a block (Shoeybi et al. 2019,
"Megatron-LM", section 3, arXiv:1909.08053). One rank draws each token and tells all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.job.model import ModelOptions
from shoal.mesh import Mesh, Seat
from shoal.models import build
from shoal.models.split import key_heads
from shoal.observe.screen import shown
from shoal.parallel.pieces import Part
from shoal.parallel.replica import Replica
from shoal.parallel.stages import layers_of_stages
from shoal.parallel.tensor import Tensors, sum_whole
from shoal.serving.cache import Cache
from shoal.serving.generate import last_logits, written
from shoal.serving.load import fill
from shoal.serving.sampler import Sampling, draw
from shoal.serving.source import Source
from shoal.serving.text import load_tokenizer
from shoal.shard import Shard


def main(
    seat: Seat, *, folder: str, options: dict[str, Any], tokenizer: str, prompt: str, max_tokens: int, seed: int,
    layout: str, **draws: Any,
) -> str:  # fmt: skip
    """What a model writes after `prompt`; rank 0 prints it as it comes.

    folder, options: the fields of its Source. layout: of pipeline and tensor, checked to fit the model. draws: the
    fields of Sampling. As for `generate`.
    """
    mesh = meshes.build(Layout.parse(layout), seat)
    try:
        first = iter([prompt])  # printed with the first piece, when all has been checked

        def show(piece: str) -> None:
            if mesh.rank == 0:
                print(shown(next(first, "") + piece, sys.stdout), end="", flush=True)

        def say(line: str) -> None:
            if mesh.rank == 0:
                print(f"\n{line}", end="", file=sys.stderr, flush=True)

        source = Source(ModelOptions(**options), Path(folder))
        model = Spread(source, mesh, say=print if mesh.rank == 0 else lambda line: None)
        text = written(
            lambda start, count: model.tokens(start, count, Sampling(**draws), seed),
            model.options, load_tokenizer(tokenizer), prompt, max_tokens, show, say,
        )  # fmt: skip
        if mesh.rank == 0:
            print(shown(next(first, ""), sys.stdout), flush=True)
        return text
    finally:
        mesh.close()


class Spread:
    """This rank's stages of a model, of each its share of every matrix, with the weights in them."""

    def __init__(
        self,
        source: Source,
        mesh: Mesh,
        dtype: torch.dtype = torch.float32,
        say: Callable[[str], None] = lambda line: None,
    ):
        """dtype: of weights and cache. say: is told what of the folder is left out."""
        self.options, self.mesh, self.dtype = source.options, mesh, dtype
        layout = mesh.layout
        self.tensors = Tensors(self.options, mesh.group("tensor"), sequence=False) if layout.tensor > 1 else None
        stages = layers_of_stages(self.options, layout, self.options.max_position_embeddings)
        mine = {stage: stages[stage] for stage in layout.stages_of(mesh.stage)}
        self.layers = [layer for layers in mine.values() for layer in layers]
        self._replica: Replica[Tensor] = Replica({stage: self._part(layers) for stage, layers in mine.items()}, mesh)
        fill(source, self.shards(), say)
        end = next(rank for rank in range(layout.pipeline) if layout.stage_count - 1 in layout.stages_of(rank))
        self.drawer = int(mesh.grid[0, end, 0, 0, 0])
        """The rank that draws the tokens: the first of those that have the last stage."""

    def _part(self, layers: range) -> Part:
        with torch.device("meta"):
            model = build(self.options, layers).to(self.dtype).eval()
        cuts = self.tensors.split(model) if self.tensors is not None else {}
        return Part(model, model.blocks, cuts)

    def shards(self) -> list[Shard]:
        """This rank's pieces of the model's tensors."""
        return self._replica.held()

    def cache(self, capacity: int) -> Cache:
        """For one row of `capacity` tokens: of this rank's blocks, the key heads that its query heads look at."""
        heads = key_heads(self.options, self.mesh.layout.tensor, self.mesh.tensor)
        return Cache(self.options, 1, capacity, self.dtype, self.mesh.device, self.layers, len(heads))

    @torch.no_grad()
    def logits(self, new_BL: Tensor, cache: Cache) -> Tensor | None:
        """Of what follows these tokens, which come after those in the cache and enter it: (B, V) on the ranks with the
        last stage, None elsewhere. All ranks call it."""
        length = new_BL.shape[1]
        position_BL = torch.arange(cache.length, cache.length + length, device=new_BL.device)[None]

        def compute(module: nn.Module, new_BL: Tensor, hidden_BLD: Tensor | None) -> Tensor:
            input_ = new_BL if hidden_BLD is None else hidden_BLD
            out: Tensor = module(input_, position_BL, cache.attend, last_logits)
            return out

        if self._replica.pipeline is None:
            made = [compute(self._replica.module, new_BL, None)]
        else:
            hidden_BLD = torch.empty(*new_BL.shape, self.options.hidden_size, dtype=self.dtype, device="meta")
            made = self._replica.pipeline.forward([new_BL], compute, hidden_BLD)
        cache.advance(length)
        return self._of_all_words(made[0]) if made else None

    def _of_all_words(self, logits_Bv: Tensor) -> Tensor:
        if self.tensors is None:
            return logits_Bv
        first = self.tensors.words().first
        logits_BV = logits_Bv.new_zeros(len(logits_Bv), self.options.vocab_size)
        logits_BV[:, first : first + logits_Bv.shape[1]] = logits_Bv
        return sum_whole(logits_BV, self.tensors.group)

    @torch.no_grad()
    def tokens(self, prompt: list[int], count: int, sampling: Sampling, seed: int) -> Iterator[int]:
        """As `shoal.serving.generate.tokens`; the same on every rank."""
        device, cache = self.mesh.device, self.cache(len(prompt) + count)
        generator = torch.Generator().manual_seed(seed)
        new_BL = torch.tensor([prompt], device=device)
        for _ in range(count):
            logits_BV = self.logits(new_BL, cache)
            new_BL = torch.zeros(1, 1, dtype=torch.int64, device=device)
            if self.mesh.rank == self.drawer:
                assert logits_BV is not None
                new_BL = draw(logits_BV, sampling, generator)[:, None]
            self.mesh.wait(dist.broadcast(new_BL, self.drawer, group=self.mesh.everyone, async_op=True))
            yield int(new_BL)
