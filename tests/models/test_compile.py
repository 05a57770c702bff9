"""Compiled blocks: the same numbers, and one compilation for all layers and micro-batches."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from shoal.models.decoder import Decoder
from shoal.ops.attention import document_attend
from shoal.ops.loss import chunked_cross_entropy
from tests.models import tiny

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None,
    reason="torch.compile needs a C++ compiler on CPU",
)


def gradients(model: Decoder, seed: int, autocast: bool) -> Tensor:
    """All gradients of one micro-batch with its own documents, in a row."""
    tokens_BL, labels_BL = tiny.tokens(2, 24, seed=seed), tiny.tokens(2, 24, seed=seed + 1)
    cut_B1 = torch.randint(2, 22, (2, 1), generator=torch.Generator().manual_seed(seed))
    document_BL = (torch.arange(24)[None] >= cut_B1).int()
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(
            tokens_BL,
            attend=document_attend(document_BL),
            head=lambda h, w: chunked_cross_entropy(h, w, labels_BL, torch.ones(2, 24)),
        ).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    "autocast", [pytest.param(False, marks=pytest.mark.nightly, id="fp32"), pytest.param(True, id="bf16")]
)
def test_one_graph_for_all_layers_and_batches(autocast: bool) -> None:
    """From eager float32: within 1e-5 of the gradient's norm in float32; in bf16 no further than 1.5× eager
    bf16."""
    torch._dynamo.reset()
    counters.clear()
    model, eager = tiny.decoder(tiny.CASES["tied"]), tiny.decoder(tiny.CASES["tied"])
    for block in model.blocks:
        block.compile()
    for seed in (10, 20, 30):
        exact = gradients(eager, seed, False)
        ours = (gradients(model, seed, autocast) - exact).norm() / exact.norm()
        plain = (gradients(eager, seed, autocast) - exact).norm() / exact.norm()
        assert ours < max(1e-5, 1.5 * plain.item())
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
