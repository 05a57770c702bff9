"""Tiny random models of shoal's, and the same of transformers' with the same weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from shoal.job.model import ModelOptions
from shoal.models import build
from shoal.models.config import to_hf
from shoal.models.decoder import Decoder
from shoal.models.spec import parameters
from shoal.models.storage import canonical
from shoal.ops.fill import Fill
from shoal.ops.initialise import initialise_

LLAMA3 = (
    '{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, '
    '"original_max_position_embeddings": 32}'
)
# Of 4 pairs of features, one is left as it is, one is half-way, and two are divided.
YARN = '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0}'
YARN_IN_FULL = (
    '{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 1.3, '
    '"beta_fast": 3.0, "beta_slow": 0.5, "truncate": false}'
)
BASE = ModelOptions(
    vocab_size=67, hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.2,
)  # fmt: skip

CASES = {
    "llama": BASE,
    "tied": replace(BASE, tie_word_embeddings=True),
    "wide_heads": replace(BASE, head_dim=12),
    "one_key_head": replace(BASE, num_key_value_heads=1),
    "no_shared_keys": replace(BASE, num_key_value_heads=4),
    "biases": replace(BASE, attention_bias=True, mlp_bias=True),
    "llama3": replace(BASE, rope_scaling=LLAMA3, rope_theta=500.0),
    "yarn": replace(BASE, rope_scaling=YARN, rope_theta=500.0),
    "yarn, all of it said": replace(BASE, rope_scaling=YARN_IN_FULL, rope_theta=500.0),
    "linear": replace(BASE, rope_scaling='{"rope_type": "linear", "factor": 2.5}'),
}


def decoder(options: ModelOptions, dtype: torch.dtype = torch.float32, seed: int = 0) -> Decoder:
    """With random biases and norms too, so that no gradient or error hides behind a zero or a one."""
    model = build(options).to(dtype)
    specs = parameters(options)
    for name, tensor in canonical(model):
        fill = Fill(specs[name].fill.mean, specs[name].fill.std or 0.1)
        initialise_(tensor, name, specs[name].shape, (0,) * tensor.ndim, fill, seed)
    return model


class _Norm64(LlamaRMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class _Rotary64(LlamaRotaryEmbedding):
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angle = position_ids[..., None].double() * self.inv_freq.double()
        angle = torch.cat((angle, angle), -1)
        return angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling


def transformers_twin(model: Decoder) -> LlamaForCausalLM:
    """transformers' Llama with the weights of `model`. In float64 its float32 islands (norms, angles, and the
    softmax of its own attention) are lifted too."""
    dtype = next(model.parameters()).dtype
    config = LlamaConfig(**to_hf(model.options), attn_implementation="sdpa" if dtype == torch.float64 else "eager")
    twin = LlamaForCausalLM(config).to(dtype).eval()
    missing, unexpected = twin.load_state_dict(dict(canonical(model)), strict=False)
    assert not unexpected
    assert missing in ([], ["lm_head.weight"])
    if dtype == torch.float64:
        for module in twin.modules():
            if isinstance(module, LlamaRMSNorm):
                module.__class__ = _Norm64
            elif isinstance(module, LlamaRotaryEmbedding):
                module.__class__ = _Rotary64
    return twin


def tokens(rows: int, length: int, vocabulary: int = BASE.vocab_size, seed: int = 0) -> Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
