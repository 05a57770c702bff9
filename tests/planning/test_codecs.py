"""What the planner knows of codecs, against the codecs: the bytes of a row, and what their operators move."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shoal.planning import codecs
from shoal.sync.codec import codec_of
from shoal.sync.codec.plain import Plain

EVERY = (
    "bf16", "fp16", "int8", "int4", "int2", "sign", "int8:unbiased", "int4:unbiased", "topk:0.05", "topk:0.5+bf16",
    "topk:0.05+int2", "topk:0.001+int2", "randomk:0.05", "randomk:0.5", "randomk:0.03+int8", "dct:0.05", "dct:0.3+int4",
)  # fmt: skip
_MOVE_NOTHING = {
    "view", "_unsafe_view", "alias", "detach", "expand", "slice", "select", "split", "split_with_sizes", "t",
    "transpose", "unsqueeze", "squeeze", "as_strided", "empty", "empty_like", "new_empty",
}  # fmt: skip


class Moved(TorchDispatchMode):
    """Bytes of what operators take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        given = op(*args, **(kwargs or {}))
        if op.overloadpacket.__name__ not in _MOVE_NOTHING:
            tensors = [t for t in tree_leaves((args, kwargs, given)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return given


@pytest.mark.parametrize("text", EVERY)
def test_bytes_and_traffic_are_those_of_the_codec(text: str):
    """Bytes on the way but for a row's key or scale, traffic within 8 %."""
    real, known = codec_of(text), codecs.of(text)
    numbers = 2**19 // real.granule * real.granule
    assert real.row_bytes(numbers) == pytest.approx(known.size * numbers, rel=1e-4, abs=80)
    row = torch.randn(1, numbers, generator=torch.Generator().manual_seed(1))
    with Moved() as encoding:
        payload = real.encode(row)
    with Moved() as decoding:
        real.decode(payload, torch.float32)
    assert payload.numel() == real.row_bytes(numbers)
    assert encoding.bytes / numbers == pytest.approx(known.encode, rel=0.08)
    assert decoding.bytes / numbers == pytest.approx(known.decode, rel=0.08)


def test_without_one_numbers_are_float32():
    assert codecs.of("none") == codecs.of("auto") == codecs.PLAIN
    assert Plain().encode(torch.zeros(1, 64)).numel() == codecs.PLAIN.size * 64
