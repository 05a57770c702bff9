"""Torch-free shapes and costs against the built model and PyTorch's own operation counter."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.models import build
from shoal.models.config import to_hf
from shoal.models.spec import count, flops_per_token, parameters
from shoal.models.storage import canonical
from tests.models import experts, tiny


@pytest.mark.parametrize("case", tiny.CASES)
def test_names_shapes_and_order_are_the_models(case: str) -> None:
    """Where several matrices are stored as one, their biases follow all of them."""
    options = tiny.CASES[case]
    with torch.device("meta"):
        model = build(options)
    built, specs = {name: tuple(t.shape) for name, t in canonical(model)}, parameters(options)
    assert built == {name: spec.shape for name, spec in specs.items()}
    for kind in (".weight", ".bias"):
        assert [n for n in built if n.endswith(kind)] == [n for n in specs if n.endswith(kind)]
    assert count(options) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", experts.CASES)
def test_names_and_shapes_of_experts_are_those_stored(case: str) -> None:
    with torch.device("meta"):
        model = build(experts.CASES[case])
    specs = parameters(experts.CASES[case])
    built = {name: tuple(tensor.shape) for name, tensor in experts.canonical(model)}
    assert built == {name: spec.shape for name, spec in specs.items()}
    assert {name for name, spec in specs.items() if not spec.learned} == {name for name, _ in model.named_buffers()}
    assert count(experts.CASES[case]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", ["llama", "tied", "wide_heads", "one_key_head", *experts.CASES])
def test_flops_are_those_that_run(case: str) -> None:
    """PyTorch counts both halves of attention's square; taking the masked half away gives ours, exactly. Of experts,
    those that a token goes to count; PyTorch counts the weighted sums of what they make, too."""
    model, length = (experts.decoder(case) if case in experts.CASES else tiny.decoder(tiny.CASES[case])), 24
    options = model.options

    def attention(q, k, v):
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)

    with FlopCounterMode(display=False) as counter:
        model(tiny.tokens(2, length), attend=lambda layer: attention).sum().backward()
    square = 6 * options.num_hidden_layers * options.num_attention_heads * length
    square *= options.head_size + options.value_size
    sums = 4 * sum(map(options.routes, range(3))) * options.num_experts_per_tok * options.hidden_size
    ran = counter.get_total_flops() / (2 * length) - square / 2 - sums
    assert flops_per_token(options, length) == pytest.approx(ran, rel=1e-14)


def test_flops_of_llama_8b() -> None:
    """6 × 7.50e9 multiplied weights (8.03e9 less the embedding's 0.53e9), and attention over 8192 tokens."""
    llama = replace(
        tiny.BASE, vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    assert count(llama) == 8_030_261_248
    assert flops_per_token(llama, 8192) == pytest.approx(6 * 7.5049e9 + 6 * 32 * 4096 * 8192, rel=1e-4)


# As published: vocabulary, width, layers, heads, key heads, experts.
PUBLISHED = {
    "Mixtral-8x7B": replace(
        experts.MIXTRAL, vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, num_experts=8, num_experts_per_tok=2,
    ),
    "Qwen1.5-MoE-A2.7B": replace(
        experts.QWEN2, vocab_size=151936, hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=16, num_experts=60, num_experts_per_tok=4,
        moe_intermediate_size=1408, shared_expert_intermediate_size=5632, first_k_dense_replace=0,
    ),
    "Qwen3-30B-A3B": replace(
        experts.QWEN3, vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768,
    ),
    "DeepSeek-V3": replace(
        experts.DEEPSEEK, vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61,
        num_attention_heads=128, num_key_value_heads=128, num_experts=256, num_experts_per_tok=8, n_group=8,
        topk_group=4, moe_intermediate_size=2048, shared_expert_intermediate_size=2048, first_k_dense_replace=3,
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("Mixtral-8x7B", 46.7e9, 12.9e9),
        ("Qwen1.5-MoE-A2.7B", 14.3e9, 2.7e9),
        ("Qwen3-30B-A3B", 30.5e9, 3.3e9),
        ("DeepSeek-V3", 671e9, 37e9),
    ],
)
def test_sizes_are_those_published(name: str, total: float, active: float) -> None:
    """To the digits in which their authors give them; and exactly as transformers builds them."""
    options = PUBLISHED[name]
    assert count(options) == pytest.approx(total, rel=2e-3)
    # Their authors count the embedding too, which is looked up and not multiplied.
    embedding = options.vocab_size * options.hidden_size
    assert flops_per_token(options, 0) / 6 + embedding == pytest.approx(active, rel=0.03)
    words = to_hf(options)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(words.pop("model_type"), **words))
    assert count(options) == sum(p.numel() for p in theirs.parameters())


def test_spec_and_config_start_without_torch() -> None:
    code = "import shoal.models.spec, shoal.models.config, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
