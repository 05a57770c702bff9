"""The decoder-only transformer: one configurable block as in Llama 2 and 3 (Touvron et al. 2023,
arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783) and SmolLM2. Modules are named so that parameters
have Hugging Face's names, but where several are stored as one (see storage.py).

Precision. Without autocast everything has the dtype of the weights. With autocast the residual stream and the
norms' statistics are in float32, and all weights are seen in autocast's dtype, the embedding and the norms
too: so it makes no difference whether autocast casts them or they arrive cast, as from mixed-precision FSDP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.job.model import ModelOptions
from shoal.models.feedforward import FeedForward
from shoal.models.moe import MoE
from shoal.models.spec import EXPERT_NAMES
from shoal.models.storage import FusedLinear
from shoal.ops.attention import Attend, Attention, causal_attend
from shoal.ops.dropout import Dropout, LayerDropout, keep_all
from shoal.ops.norm import rms_norm
from shoal.ops.rope import attention_factor, frequencies, latent_factor, rotate, rotation

# Sites of dropout in a layer; that of the embedding is in layer 0.
_ATTENTION, _FEED_FORWARD, _EMBEDDING = range(3)

Head = Callable[[Tensor, Tensor], Any]
"""(hidden_BLD, weight_VD) -> what forward returns, instead of logits."""


class Norm(nn.Module):
    def __init__(self, options: ModelOptions, size: int = 0, eps: float = 0.0):
        """size: features, 0 = hidden_size. eps: 0 = rms_norm_eps."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size or options.hidden_size))
        self.eps = eps or options.rms_norm_eps

    def forward(self, x_BLD: Tensor) -> Tensor:
        dtype = _dtype(x_BLD)
        return rms_norm(x_BLD, self.weight.to(dtype), self.eps, dtype)


class SelfAttention(nn.Module):
    def __init__(self, options: ModelOptions):
        super().__init__()
        self.head_size = options.head_size
        queries = options.num_attention_heads * options.head_size
        keys = options.num_key_value_heads * options.head_size
        bias = options.attention_bias or options.qkv_bias
        outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self.qkv_proj = FusedLinear(options.hidden_size, outputs, bias)
        self.o_proj = nn.Linear(queries, options.hidden_size, bias=options.attention_bias)
        # Of queries and keys, each head by itself (Qwen3).
        normed = options.family == "qwen3_moe"
        self.q_norm = Norm(options, options.head_size) if normed else None
        self.k_norm = Norm(options, options.head_size) if normed else None

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        q_BLHD, k_BLKD, v_BLKD = (x_BLF.unflatten(-1, (-1, self.head_size)) for x_BLF in self.qkv_proj(x_BLD))
        if self.q_norm is not None and self.k_norm is not None:
            q_BLHD, k_BLKD = self.q_norm(q_BLHD), self.k_norm(k_BLKD)
        q_BLHD, k_BLKD = rotate(q_BLHD, cos, sin), rotate(k_BLKD, cos, sin)
        return self.o_proj(attention(q_BLHD, k_BLKD, v_BLKD).flatten(2))


class LatentAttention(nn.Module):
    """Keys and values are made from a few features of each token, queries too if so asked; of each query only a part
    has a position, as has one key that all heads share (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1,
    arXiv:2405.04434)."""

    def __init__(self, options: ModelOptions):
        super().__init__()
        o, heads, bias = options, options.num_attention_heads, options.attention_bias
        self.options, self.factor = options, latent_factor(options.rope_scaling)
        # Theirs have this eps whatever config.json says.
        norm = partial(Norm, options, eps=1e-6)
        if o.q_lora_rank:
            self.q_a_proj = nn.Linear(o.hidden_size, o.q_lora_rank, bias=bias)
            self.q_a_layernorm = norm(o.q_lora_rank)
            self.q_b_proj = nn.Linear(o.q_lora_rank, heads * o.head_size, bias=False)
        else:
            self.q_proj = nn.Linear(o.hidden_size, heads * o.head_size, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(o.hidden_size, o.kv_lora_rank + o.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = norm(o.kv_lora_rank)
        self.kv_b_proj = nn.Linear(o.kv_lora_rank, heads * (o.qk_nope_head_dim + o.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * o.v_head_dim, o.hidden_size, bias=bias)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        o = self.options
        q_BLF = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BLD))) if o.q_lora_rank else self.q_proj(x_BLD)
        q_BLHN, q_BLHR = q_BLF.unflatten(-1, (-1, o.head_size)).split([o.qk_nope_head_dim, o.qk_rope_head_dim], -1)
        latent_BLC, k_BLR = self.kv_a_proj_with_mqa(x_BLD).split([o.kv_lora_rank, o.qk_rope_head_dim], -1)
        kv_BLHF = self.kv_b_proj(self.kv_a_layernorm(latent_BLC)).unflatten(-1, (o.num_attention_heads, -1))
        k_BLHN, v_BLHV = kv_BLHF.split([o.qk_nope_head_dim, o.v_head_dim], -1)
        k_BLHR = rotate(_pairs_apart(k_BLR[:, :, None]), cos, sin).expand(*k_BLHN.shape[:3], -1)
        q_BLHD = torch.cat((q_BLHN, rotate(_pairs_apart(q_BLHR), cos, sin)), -1) * self.factor
        return self.o_proj(attention(q_BLHD, torch.cat((k_BLHN, k_BLHR), -1), v_BLHV).flatten(2))


def _pairs_apart(x: Tensor) -> Tensor:
    """Features 2i and 2i + 1 to i and i + D/2: DeepSeek rotates neighbours. Scores do not see the new order."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), -1)


class Block(nn.Module):
    """Holds nothing that differs between layers of a kind (dense, with experts) but its weights, so that compiling one
    compiles all."""

    def __init__(self, options: ModelOptions, layer: int):
        """layer: its number, from 0."""
        super().__init__()
        self.input_layernorm = Norm(options)
        self.self_attn = LatentAttention(options) if options.kv_lora_rank else SelfAttention(options)
        self.post_attention_layernorm = Norm(options)
        self.routes = options.routes(layer)
        if self.routes:
            self.feed_forward = EXPERT_NAMES[options.family].layer
            self.add_module(self.feed_forward, MoE(options))
        else:
            self.mlp = FeedForward(options)

    def forward(
        self,
        x_BLD: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: Attention,
        valid_BL: Tensor | None = None,
        drop: LayerDropout = keep_all,
    ) -> Tensor:
        """valid_BL: as in MoE. drop: of what is added to the residual stream."""
        x_BLD = x_BLD + drop(self.self_attn(self.input_layernorm(x_BLD), cos, sin, attention), _ATTENTION)
        normed_BLD = self.post_attention_layernorm(x_BLD)
        if self.routes:
            return x_BLD + drop(self.get_submodule(self.feed_forward)(normed_BLD, valid_BL), _FEED_FORWARD)
        return x_BLD + drop(self.mlp(normed_BLD), _FEED_FORWARD)


class Trunk(nn.Module):
    """Tokens to hidden states. Called `model` inside the decoder, as in Hugging Face's names."""

    def __init__(self, options: ModelOptions, layers: range, embeds: bool):
        super().__init__()
        self.options, self.first, self.last = options, layers.start == 0, layers.stop == options.num_hidden_layers
        if embeds:
            self.embed_tokens = nn.Embedding(options.vocab_size, options.hidden_size)
        # By number, so that a part of the model has the names that its parameters have in the whole.
        self.layers = nn.ModuleDict({str(layer): Block(options, layer) for layer in layers})
        if self.last:
            self.norm = Norm(options)

    def forward(
        self,
        input_: Tensor,
        positions_BL: Tensor | None,
        attend: Attend,
        valid_BL: Tensor | None,
        drop: Dropout | None,
    ) -> Tensor:
        if positions_BL is None:
            positions_BL = torch.arange(input_.shape[1], device=input_.device)[None]
        o = self.options
        x_BLD = self._embed(input_, drop) if self.first else input_
        frequency = frequencies(o.rotary_size, o.rope_theta, o.rope_scaling, x_BLD.device)
        cos, sin = rotation(positions_BL, frequency, x_BLD.dtype, attention_factor(o.rope_scaling))
        for layer, block in self.layers.items():
            of_layer = drop.at(int(layer)) if drop else keep_all
            x_BLD = block(x_BLD, cos, sin, attend(int(layer)), valid_BL, of_layer)
        return self.norm(x_BLD) if self.last else x_BLD

    def _embed(self, tokens_BL: Tensor, drop: Dropout | None) -> Tensor:
        x_BLD = self.embed_tokens(tokens_BL)
        if torch.is_autocast_enabled(x_BLD.device.type):
            x_BLD = x_BLD.to(_dtype(x_BLD)).float()
        return drop(x_BLD, 0, _EMBEDDING) if drop else x_BLD


class Decoder(nn.Module):
    """A language model: tokens in, logits of the next token out. Or consecutive blocks of one: hidden states in, unless
    they are the first ones, and hidden states out, unless they are the last ones."""

    def __init__(self, options: ModelOptions, layers: range | None = None):
        """layers: the blocks, None = all."""
        super().__init__()
        self.options = options
        self.layers = layers = range(options.num_hidden_layers) if layers is None else layers
        tied = options.tie_word_embeddings
        last = layers.stop == options.num_hidden_layers
        self.model = Trunk(options, layers, embeds=layers.start == 0 or (last and tied))
        self.lm_head = nn.Linear(options.hidden_size, options.vocab_size, bias=False) if last and not tied else None

    @property
    def blocks(self) -> list[nn.Module]:
        """The units of compiling, recomputing and gathering."""
        return list(self.model.layers.values())

    def forward(
        self,
        input_ids: Tensor,
        positions_BL: Tensor | None = None,
        attend: Attend | None = None,
        head: Head | None = None,
        valid_BL: Tensor | None = None,
        drop: Dropout | None = None,
    ) -> Any:
        """Logits (B, L, V), or what `head(hidden_BLD, weight_VD)` makes of the last hidden states and output
        weights.

        input_ids: tokens (B, L); named as in Hugging Face's models. For blocks that are not the first ones, hidden
        states (B, L, D). positions_BL: each token's place in its document, None = its place in the row. attend: layer
        index -> attention function, None = causal over the row. The head runs in here so that whatever gathers weights
        sees it. valid_BL: False where a row is filled up, which only experts need to know; None = nowhere. drop: of
        this micro-batch, None = no dropout.
        """
        hidden_BLD = self.model(input_ids, positions_BL, attend or causal_attend(), valid_BL, drop)
        if not self.model.last:
            return hidden_BLD
        weight_VD = (self.model.embed_tokens if self.lm_head is None else self.lm_head).weight
        return (head or F.linear)(hidden_BLD, weight_VD)


def create(options: ModelOptions, layers: range | None = None) -> Decoder:
    """The model without values, on the default device. Made on meta first: torch's own initialisation is not
    run."""
    where = torch.get_default_device()
    with torch.device("meta"):
        model = Decoder(options, layers)
    return model if where.type == "meta" else model.to_empty(device=where)


def _dtype(x: Tensor) -> torch.dtype:
    """In which weights are seen and matrix products made: autocast's dtype if it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
