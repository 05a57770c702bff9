"""The decoder-only transformer: one configurable block as in Llama 2 and 3 (Touvron et al. 2023,
arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783) and SmolLM2. Modules are named so that parameters
have Hugging Face's names.

Precision. Without autocast everything has the dtype of the weights. With autocast the residual stream and the
norms' statistics are in float32, and all weights are seen in autocast's dtype, the embedding and the norms
too: so it makes no difference whether autocast casts them or they arrive cast, as from mixed-precision FSDP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.job.model import ModelOptions
from shoal.ops.attention import Attend, Attention, causal_attend
from shoal.ops.norm import rms_norm
from shoal.ops.rope import frequencies, rotate, rotation

Head = Callable[[Tensor, Tensor], Any]
"""(hidden_BLD, weight_VD) -> what forward returns, instead of logits."""


class Norm(nn.Module):
    def __init__(self, options: ModelOptions):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(options.hidden_size))
        self.eps = options.rms_norm_eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        dtype = _dtype(x_BLD)
        return rms_norm(x_BLD, self.weight.to(dtype), self.eps, dtype)


class SelfAttention(nn.Module):
    def __init__(self, options: ModelOptions):
        super().__init__()
        self.head_size = options.head_size
        queries = options.num_attention_heads * options.head_size
        keys = options.num_key_value_heads * options.head_size
        self.q_proj = nn.Linear(options.hidden_size, queries, bias=options.attention_bias)
        self.k_proj = nn.Linear(options.hidden_size, keys, bias=options.attention_bias)
        self.v_proj = nn.Linear(options.hidden_size, keys, bias=options.attention_bias)
        self.o_proj = nn.Linear(queries, options.hidden_size, bias=options.attention_bias)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        q_BLHD = rotate(self._heads(self.q_proj(x_BLD)), cos, sin)
        k_BLKD = rotate(self._heads(self.k_proj(x_BLD)), cos, sin)
        v_BLKD = self._heads(self.v_proj(x_BLD))
        return self.o_proj(attention(q_BLHD, k_BLKD, v_BLKD).flatten(2))

    def _heads(self, x_BLF: Tensor) -> Tensor:
        return x_BLF.unflatten(-1, (-1, self.head_size))


class FeedForward(nn.Module):
    """Gated with SiLU (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.gate_proj = nn.Linear(options.hidden_size, options.intermediate_size, bias=options.mlp_bias)
        self.up_proj = nn.Linear(options.hidden_size, options.intermediate_size, bias=options.mlp_bias)
        self.down_proj = nn.Linear(options.intermediate_size, options.hidden_size, bias=options.mlp_bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BLD)) * self.up_proj(x_BLD))


class Block(nn.Module):
    """Holds nothing that differs between layers but its weights, so that compiling one compiles all."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.input_layernorm = Norm(options)
        self.self_attn = SelfAttention(options)
        self.post_attention_layernorm = Norm(options)
        self.mlp = FeedForward(options)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        x_BLD = x_BLD + self.self_attn(self.input_layernorm(x_BLD), cos, sin, attention)
        return x_BLD + self.mlp(self.post_attention_layernorm(x_BLD))


class Trunk(nn.Module):
    """Tokens to hidden states. Called `model` inside the decoder, as in Hugging Face's names."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.embed_tokens = nn.Embedding(options.vocab_size, options.hidden_size)
        self.layers = nn.ModuleList(Block(options) for _ in range(options.num_hidden_layers))
        self.norm = Norm(options)
        self.options = options

    def forward(self, tokens_BL: Tensor, positions_BL: Tensor | None, attend: Attend) -> Tensor:
        if positions_BL is None:
            positions_BL = torch.arange(tokens_BL.shape[1], device=tokens_BL.device)[None]
        o = self.options
        x_BLD = self.embed_tokens(tokens_BL)
        if torch.is_autocast_enabled(x_BLD.device.type):
            x_BLD = x_BLD.to(_dtype(x_BLD)).float()
        frequency = frequencies(o.head_size, o.rope_theta, o.rope_scaling, x_BLD.device)
        cos, sin = rotation(positions_BL, frequency, x_BLD.dtype)
        for layer, block in enumerate(self.layers):
            x_BLD = block(x_BLD, cos, sin, attend(layer))
        return self.norm(x_BLD)


class Decoder(nn.Module):
    """A language model: tokens in, logits of the next token out."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        self.options = options
        self.model = Trunk(options)
        self.lm_head = (
            None if options.tie_word_embeddings else nn.Linear(options.hidden_size, options.vocab_size, bias=False)
        )

    @property
    def blocks(self) -> nn.ModuleList:
        """The units of compiling, recomputing and gathering."""
        return self.model.layers

    def forward(
        self,
        input_ids: Tensor,
        positions_BL: Tensor | None = None,
        attend: Attend | None = None,
        head: Head | None = None,
    ) -> Any:
        """Logits (B, L, V), or what `head(hidden_BLD, weight_VD)` makes of the last hidden states and output
        weights.

        input_ids: tokens (B, L); named as in Hugging Face's models. positions_BL: each token's place in its
        document, None = its place in the row. attend: layer index -> attention function, None = causal over
        the row. The head runs in here so that whatever gathers weights sees it.
        """
        hidden_BLD = self.model(input_ids, positions_BL, attend or causal_attend())
        weight_VD = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        return (head or F.linear)(hidden_BLD, weight_VD)


def create(options: ModelOptions) -> Decoder:
    """The model without values, on the default device. Made on meta first: torch's own initialisation is not
    run."""
    where = torch.get_default_device()
    with torch.device("meta"):
        model = Decoder(options)
    return model if where.type == "meta" else model.to_empty(device=where)


def _dtype(x: Tensor) -> torch.dtype:
    """In which weights are seen and matrix products made: autocast's dtype if it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
