"""Torch-free shapes and costs against the built model and PyTorch's own operation counter."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shoal.models import build
from shoal.models.spec import count, flops_per_token, parameters
from tests.models import tiny


@pytest.mark.parametrize("case", tiny.CASES)
def test_names_shapes_and_order_are_the_models(case: str) -> None:
    options = tiny.CASES[case]
    with torch.device("meta"):
        model = build(options)
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert list(built.items()) == [(name, spec.shape) for name, spec in parameters(options).items()]
    assert count(options) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", ["llama", "tied", "wide_heads", "one_key_head"])
def test_flops_are_those_that_run(case: str) -> None:
    """PyTorch counts both halves of attention's square; taking the masked half away gives ours, exactly."""
    options = tiny.CASES[case]
    model, length = tiny.decoder(options), 24

    def attention(q, k, v):
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)

    with FlopCounterMode(display=False) as counter:
        model(tiny.tokens(2, length), attend=lambda layer: attention).sum().backward()
    square = 12 * options.num_hidden_layers * options.num_attention_heads * options.head_size * length
    assert flops_per_token(options, length) == counter.get_total_flops() / (2 * length) - square / 2


def test_flops_of_llama_8b() -> None:
    """6 × 7.50e9 multiplied weights (8.03e9 less the embedding's 0.53e9), and attention over 8192 tokens."""
    llama = replace(
        tiny.BASE, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    assert count(llama) == 8_030_261_248
    assert flops_per_token(llama, 8192) == pytest.approx(6 * 7.5049e9 + 6 * 32 * 4096 * 8192, rel=1e-4)


def test_spec_and_config_start_without_torch() -> None:
    code = "import shoal.models.spec, shoal.models.config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
