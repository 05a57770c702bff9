"""Tiny random models with experts, of each family, and how their stored tensors stand for canonical ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from shoal.models import build
from shoal.models.decoder import Decoder
from shoal.models.spec import parameters
from shoal.models.storage import FusedLinear
from shoal.ops.fill import Fill
from shoal.ops.initialise import initialise_
from tests.models import tiny

_ROUTED = replace(tiny.BASE, num_experts=6, num_experts_per_tok=2)
_SIZED = replace(_ROUTED, moe_intermediate_size=24, num_experts_per_tok=3)
MIXTRAL = replace(_ROUTED, family="mixtral")
QWEN2 = replace(
    _SIZED, family="qwen2_moe", shared_expert_intermediate_size=40, qkv_bias=True, norm_topk_prob=False,
    first_k_dense_replace=1,
)  # fmt: skip
QWEN3 = replace(_SIZED, family="qwen3_moe", head_dim=12)
DEEPSEEK = replace(
    _SIZED, family="deepseek_v3", num_experts=8, n_group=4, topk_group=2, shared_expert_intermediate_size=48,
    first_k_dense_replace=1, routed_scaling_factor=2.5, num_key_value_heads=4, q_lora_rank=20, kv_lora_rank=16,
    qk_nope_head_dim=10, qk_rope_head_dim=6, v_head_dim=14,
)  # fmt: skip

DEEPSEEK2 = replace(DEEPSEEK, family="deepseek_v2", norm_topk_prob=False)
# As in what DeepSeek publishes, but that there both mscales are 1 and cancel each other where features are rotated.
YARN = (
    '{"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "beta_fast": 2.0, "beta_slow": 1.0, '
    '"mscale": 0.7, "mscale_all_dim": 1.2}'
)

CASES = {
    "mixtral": MIXTRAL,
    "mixtral, yarn": replace(MIXTRAL, rope_scaling=tiny.YARN, rope_theta=500.0),
    "qwen2_moe": QWEN2,
    "qwen2_moe, normalised": replace(QWEN2, norm_topk_prob=True, first_k_dense_replace=0, qkv_bias=False),
    "qwen3_moe": QWEN3,
    "qwen3_moe, plain weights": replace(QWEN3, norm_topk_prob=False, attention_bias=True, tie_word_embeddings=True),
    "deepseek_v2": DEEPSEEK2,
    "deepseek_v2, as Lite": replace(DEEPSEEK2, n_group=1, topk_group=1, q_lora_rank=0, rope_scaling=YARN),
    "deepseek_v3": DEEPSEEK,
    "qwen3_moe, yarn": replace(QWEN3, rope_scaling=tiny.YARN, rope_theta=500.0),
    "deepseek_v3, yarn": replace(DEEPSEEK, rope_scaling=YARN, rope_theta=100.0),
    "deepseek_v3, one group": replace(
        DEEPSEEK, n_group=1, topk_group=1, q_lora_rank=0, norm_topk_prob=False, attention_bias=True
    ),
}


def canonical(model: nn.Module, gradients: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Every canonical tensor of a model: a view of what it stores, or of its gradient."""
    for path, module in model.named_modules():
        prefix, stored = f"{path}." if path else "", getattr(module, "stored", {})
        if isinstance(module, FusedLinear):  # what is in it has its names beside it
            prefix = prefix.removesuffix(f"{path.rpartition('.')[2]}.")
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if gradients:
                tensor = tensor.grad
            if name not in stored:
                yield prefix + name, tensor
            first = 0
            for piece, rows in stored.get(name, ()):
                at = first if rows is None else slice(first, first + rows)
                yield prefix + piece, None if tensor is None else tensor[at]
                first += rows or 1


def decoder(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: object) -> Decoder:
    """With random norms and biases too. Routers have wide scores, so that rounding cannot change a choice."""
    model = build(replace(CASES[name], **options)).to(dtype)
    specs = parameters(model.options)
    for piece, tensor in canonical(model):
        fill = Fill(specs[piece].fill.mean, specs[piece].fill.std or 0.1)
        initialise_(tensor.detach(), piece, specs[piece].shape, (0,) * tensor.ndim, fill, seed)
    return model
