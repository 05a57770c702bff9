"""What a codec takes, of a number: bytes on the way, and bytes that its operators move through memory.

The codecs themselves need torch (`shoal.sync.codec`); tests hold these figures against them.
"""

from __future__ import annotations

from typing import NamedTuple

from shoal.job.codec import Part, parse

# Bytes of a long row, of each number; read and written to encode it, and to decode it, as torch's operators are called
# (each by itself, nothing fused; tests count them). unbiased: hashes of places, beside.
_ROUNDING = {
    "float32": (4.0, 0.0, 0.0), "bf16": (2.0, 6.0, 6.0), "fp16": (2.0, 30.0, 14.0), "int8": (66 / 64, 43.5, 33.2),
    "int4": (34 / 64, 48.5, 41.7), "int2": (20 / 64, 89.7, 49.6), "sign": (10 / 64, 44.2, 63.3),
}  # fmt: skip
_UNBIASED = 169.0
# Of codecs that keep a share: ((to encode, of each number, of each that is kept), (to decode, likewise)).
_KEEPING = {
    "topk": ((64.0, 97.0), (12.0, 21.0)), "dct": ((72.0, 97.0), (36.0, 21.0)),
    "randomk": ((12.0, 274.0), (12.0, 224.0)),
}  # fmt: skip


class Codec(NamedTuple):
    """Of each number of a long row. size: bytes on the way. encode, decode: bytes through memory."""

    size: float
    encode: float
    decode: float


PLAIN = Codec(4.0, 0.0, 0.0)
"""float32 as it is."""


def of(text: str) -> Codec:
    """Of what `sync.codec` says, but not `powersgd`, which writes matrices. `auto` is what it is on one machine."""
    if text in ("none", "auto"):
        return PLAIN
    first, *second = parse(text)
    assert first.name in _ROUNDING or first.name in _KEEPING, f"{text} writes matrices, not numbers"
    if not first.share:
        return _rounded(first)
    value = _rounded(second[0] if second else Part("float32"))
    kept, place = _kept(first)
    encode, decode = _KEEPING[first.name]
    return Codec(
        kept * (place + value.size),
        encode[0] + kept * (encode[1] + value.encode),
        decode[0] + kept * (decode[1] + value.decode),
    )


def _rounded(part: Part) -> Codec:
    size, encode, decode = _ROUNDING[part.name]
    return Codec(size, encode + _UNBIASED * part.unbiased, decode)


def _kept(part: Part) -> tuple[float, int]:
    """(the share that is kept, bytes that say where one lay)."""
    if part.name == "randomk":
        return 1 / round(1 / part.share), 0
    chunk = 256 if part.share >= 1 / 256 else 4096
    return max(1, round(part.share * chunk)) / chunk, 1 if chunk == 256 else 2
