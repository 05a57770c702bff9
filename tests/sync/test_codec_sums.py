"""Sums of what travels encoded in fewer than 16 bits: three ranks against one process, bytes against the sockets."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from shoal.sync.codec import codec_of
from tests.sync import encoded_cases
from tests.sync.codec_cases import length


def one_process(text: str) -> list[list[float]]:
    """What `encoded_cases.sums` is to tell: chunks encoded by each rank, added up by their owner, encoded again."""
    codecs = [codec_of(text) for _ in range(3)]
    of_ranks = [encoded_cases.values(rank, torch.float32) for rank in range(3)]
    for _ in range(2):
        sums = [torch.zeros(size) for size in encoded_cases.SIZES]
        arrived = [[sent(codecs[rank], tensor) for tensor in of_ranks[rank]] for rank in range(3)]
        for index, total in enumerate(sums):
            owned = [torch.stack([arrived[rank][index][owner] for rank in range(3)]) for owner in range(3)]
            again = [codecs[owner].encode(added(codecs[owner], rows)) for owner, rows in enumerate(owned)]
            total.copy_(codecs[0].decode(torch.cat(again), torch.float32).view(-1)[: len(total)])
    return [total.tolist() for total in sums]


def sent(codec: Any, tensor: torch.Tensor) -> torch.Tensor:
    """(owners, bytes)."""
    chunk = length(codec, -(-len(tensor) // 3))
    padded = torch.zeros(3 * chunk)
    padded[: len(tensor)] = tensor
    return codec.encode(padded.view(3, chunk))


def added(codec: Any, rows: torch.Tensor) -> torch.Tensor:
    first, second, third = codec.decode(rows, torch.float32)
    return (first + second + third)[None]


@pytest.mark.parametrize(
    "text", ["int8", "int4:unbiased", "sign", "topk:0.1+int2", "randomk:0.25", "randomk:0.25:unbiased+int8", "dct:0.1"]
)
def test_a_sum_is_that_of_one_process(ranks, text):
    told = ranks.run("tests.sync.encoded_cases:sums", 3, codec=text, dtype="float32")
    assert told[0] == told[1] == told[2]
    for got, expected in zip(told[0], one_process(text), strict=True):
        if text.startswith("dct"):  # a matrix product may round otherwise in another process
            assert torch.allclose(torch.tensor(got), torch.tensor(expected), atol=1e-5)
        else:
            assert got == expected


@pytest.mark.parametrize(("text", "most"), [("int8", 0.27), ("topk:0.05+int2", 0.02)])
@pytest.mark.skipif(sys.platform != "linux", reason="only there sockets are counted")
def test_so_many_fewer_bytes_go_through_the_sockets(ranks, text, most):
    """Of n numbers in float32, an all-reduce of three ranks sends 4/3 n times 4 bytes a rank."""
    size = 3_000_000
    for sent, received in ranks.run("tests.sync.encoded_cases:bytes_of_a_sum", 3, codec=text, size=size):
        least = 4 / 3 * codec_of(text).row_bytes(length(codec_of(text), size))
        assert least <= sent <= most * 4 / 3 * 4 * size
        assert least <= received <= most * 4 / 3 * 4 * size


@pytest.mark.parametrize(
    ("text", "feedback"),
    [
        ("int8", True),
        ("topk:0.05+int2", True),
        ("randomk:0.1", True),
        ("randomk:0.1:unbiased", False),
        ("powersgd:2", True),
        ("powersgd:2", False),
    ],
)
def test_a_job_trains_with_it_and_replicas_stay_equal(ranks, text, feedback):
    options = {"steps": 4, "layout": "replicas=3,micro_batch=2", "optimizer": "sgd", "model": "even"}
    results = ranks.run("tests.sync.encoded_cases:train", 3, codec=text, feedback=feedback, **options)
    for result in results[1:]:
        assert result["losses"] == results[0]["losses"]
        assert result["weights"] == results[0]["weights"]
    assert results[0]["losses"][-1] < results[0]["losses"][0]
