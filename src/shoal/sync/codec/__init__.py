"""How gradients are written for the network: a codec turns numbers into bytes and back (docs/codecs.md)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from shoal.job.codec import Part, parse
from shoal.sync.codec.blocks import Integers
from shoal.sync.codec.cast import Bf16, Float32, Fp16
from shoal.sync.codec.cosine import Dct
from shoal.sync.codec.draws import Draws
from shoal.sync.codec.protocol import Codec as Codec
from shoal.sync.codec.protocol import SizedCodec
from shoal.sync.codec.signs import Int2, Sign
from shoal.sync.codec.sparse import RandomK, TopK

CODECS: dict[str, Callable[..., SizedCodec]] = {
    "bf16": Bf16, "fp16": Fp16, "int8": partial(Integers, 8), "int4": partial(Integers, 4), "int2": Int2, "sign": Sign,
    "topk": TopK, "randomk": RandomK, "dct": Dct,
}  # fmt: skip


def codec_of(text: str, draws: Draws | None = None) -> SizedCodec:
    """The codec of which `sync.codec` speaks, e.g. `int8` or `topk:0.05+int2`, but not `powersgd:4`, which is none of
    single numbers (`sync.lowrank`). Raises JobError.

    draws: where it gets its random numbers; as by seed 0 and rank 0 if not given.
    """
    first, *second = parse(text)
    assert first.name in CODECS, f"{text} writes matrices, not numbers"
    draws = draws or Draws()
    if not first.share:
        return _rounding(first, draws)
    values = _rounding(second[0], draws) if second else Float32()
    if first.name == "randomk":
        return RandomK(first.share, values, draws, first.unbiased)
    return CODECS[first.name](first.share, values)


def _rounding(part: Part, draws: Draws) -> SizedCodec:
    return CODECS[part.name](draws) if part.unbiased else CODECS[part.name]()
