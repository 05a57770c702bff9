"""Messages as frames: what comes has to be as much as the message says."""

from __future__ import annotations

import pytest
import torch

from shoal.sync.server import messages as m
from shoal.sync.server.messages import Key, Piece
from shoal.sync.server.node import frames
from shoal.sync.server.wire import FrameError

KEY, PIECES = Key(0, 0, 0), (Piece("a", (0, 0), (2, 3)), Piece("b", (0,), (4,)))


@pytest.mark.parametrize(
    ("message", "count"),
    [
        (m.Stage(KEY, 0, 1, PIECES, encoded=True), 2),
        (m.Stage(KEY, 0, 1, (), encoded=True), 0),
        (m.Pulled(KEY, 0, 3, PIECES, base=1, links=(2, 3)), 4),
        (m.Pulled(KEY, 0, 3, PIECES, base=3), 0),
    ],
)
def test_encoded_tensors_are_as_many_as_pieces_for_each_delta(message, count):
    found = frames.places(message, [7] * count, torch.float32)
    assert [(tensor.dtype, tensor.shape) for tensor in found] == [(torch.uint8, (7,))] * count
    for other in {count + 1, abs(count - 1)}:
        with pytest.raises(FrameError, match="tensors with"):
            frames.places(message, [7] * other, torch.float32)


def test_plain_tensors_are_as_long_as_their_pieces():
    message = m.Stage(KEY, 0, 1, PIECES)
    assert [tensor.shape for tensor in frames.places(message, [24, 16], torch.float32)] == [(2, 3), (4,)]
    for lengths in ([24], [24, 15], [16, 24], [24, 16, 0]):
        with pytest.raises(FrameError):
            frames.places(message, lengths, torch.float32)
