"""Text from a model whose blocks are on several ranks: each keeps its stage's weights and keys, none the whole.

Hidden states go from stage to stage; the last one draws the token and tells all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
import torch.distributed as dist

from shoal import mesh as meshes
from shoal.job import Layout
from shoal.job.fits import check_stages
from shoal.job.model import ModelOptions
from shoal.mesh import Mesh, Seat
from shoal.models.decoder import Decoder
from shoal.parallel.stages import layers_of_stages
from shoal.serving.cache import Cache
from shoal.serving.generate import checked_prompt
from shoal.serving.load import load
from shoal.serving.sampler import Sampling, draw
from shoal.serving.text import Stream, load_tokenizer


def main(
    seat: Seat, *, model: str, tokenizer: str, prompt: str, max_tokens: int, seed: int, layout: str, **draws
) -> str:
    """What the model in the folder `model` writes after `prompt`; rank 0 prints it as it comes.

    layout: of a pipeline. draws: the fields of Sampling. As for `generate`.
    """
    parsed = Layout.parse(layout)
    mesh = meshes.build(parsed, seat)
    try:

        def mine(options: ModelOptions) -> range:
            check_stages(options, parsed)
            return layers_of_stages(options, parsed, options.max_position_embeddings)[mesh.stage]

        part = load(model, say=lambda line: None, part=mine)
        known = load_tokenizer(Path(tokenizer))
        start, count = checked_prompt(part.options, known, prompt, max_tokens)
        first = iter([prompt])  # printed with the first piece, when all has been checked

        def show(piece: str) -> None:
            if mesh.rank == 0:
                print(next(first, "") + piece, end="", file=sys.stdout, flush=True)

        stream = Stream(known, start, show)
        for token in _tokens(part, mesh, start, count, Sampling(**draws), seed):
            if token in known.ends:
                break
            stream.add(token)
        text = stream.end()
        if mesh.rank == 0:
            print(next(first, ""), flush=True)
        return text
    finally:
        mesh.close()


@torch.no_grad()
def _tokens(part: Decoder, mesh: Mesh, prompt: list[int], count: int, sampling: Sampling, seed: int) -> Iterator[int]:
    """The same on every rank."""
    options, group, last = part.options, mesh.group("pipeline"), mesh.layout.pipeline - 1
    weight = next(chain(part.parameters()))
    cache = Cache(options, 1, len(prompt) + count, weight.dtype, weight.device, part.layers)
    generator = torch.Generator().manual_seed(seed)
    new_BL = torch.tensor([prompt], device=weight.device)
    for _ in range(count):
        length = new_BL.shape[1]
        position_BL = torch.arange(cache.length, cache.length + length, device=weight.device)[None]
        input_ = new_BL
        if mesh.stage > 0:
            input_ = torch.empty(1, length, options.hidden_size, dtype=weight.dtype, device=weight.device)
            dist.recv(input_, group=group, group_src=mesh.stage - 1)
        out = part(input_, position_BL, cache.attend, lambda hidden_BLD, weight_VD: hidden_BLD[:, -1] @ weight_VD.T)
        cache.advance(length)
        new_BL = torch.zeros(1, 1, dtype=torch.int64, device=weight.device)
        if mesh.stage < last:
            dist.send(out.contiguous(), group=group, group_dst=mesh.stage + 1)
        else:
            new_BL = draw(out, sampling, generator)[:, None].to(weight.device)
        dist.broadcast(new_BL, group=group, group_src=last)
        yield int(new_BL)
