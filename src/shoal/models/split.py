"""How a model's parameters are split over the ranks of the tensor axis, as data (Shoeybi et al. 2019, "Megatron-LM",
section 3, arXiv:1909.08053; sequence parallelism: Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2).

Keys are patterns of canonical module names, also where a model stores several of them as one. Between the modules that
are split, each rank has all features of a part of the sequence; `GATHERED` modules see the whole sequence and a part of
the features.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from shoal.job.model import ModelOptions
from shoal.models.spec import EXPERT_NAMES

WORDS = "words"
"""An embedding or output layer: each rank has some rows of the vocabulary."""
GATHERED = "gathered"
"""A group of layers: what goes in is gathered along the sequence."""
QUERIES = "queries"
"""A matrix whose outputs are query heads: each rank has some heads."""
KEYS = "keys"
"""A matrix whose outputs are key or value heads: each rank has those that its query heads look at. So the same head
may be on several ranks."""
FEATURES = "features"
"""A matrix whose outputs are features of their own: each rank has some rows."""
INPUTS = "inputs"
"""A matrix that takes what the ones above make: each rank has some columns. What comes out is summed over the ranks,
and each keeps its part of the sequence."""
WHOLE = "whole"
"""A vector or a small matrix that every rank holds; its gradient is the sum of what the ranks see of it."""

DECODER: dict[str, str] = {
    "model.embed_tokens": WORDS,
    "model.layers.*.input_layernorm": WHOLE,
    "model.layers.*.self_attn": GATHERED,
    "model.layers.*.self_attn.q_proj": QUERIES,
    "model.layers.*.self_attn.k_proj": KEYS,
    "model.layers.*.self_attn.v_proj": KEYS,
    "model.layers.*.self_attn.[qk]_norm": WHOLE,
    "model.layers.*.self_attn.o_proj": INPUTS,
    "model.layers.*.post_attention_layernorm": WHOLE,
    "model.layers.*.mlp": GATHERED,
    "model.layers.*.mlp.gate_proj": FEATURES,
    "model.layers.*.mlp.up_proj": FEATURES,
    "model.layers.*.mlp.down_proj": INPUTS,
    "model.norm": WHOLE,
    "lm_head": WORDS,
}

LATENT: dict[str, str] = {
    "model.layers.*.self_attn.q_a_*": WHOLE,
    "model.layers.*.self_attn.q_b_proj": QUERIES,
    "model.layers.*.self_attn.kv_a_*": WHOLE,
    "model.layers.*.self_attn.kv_b_proj": QUERIES,
}
"""Latent attention, besides: what all heads share is made on every rank, of the whole sequence."""

ROUTED: dict[str, str] = {
    "gate": WHOLE,
    "experts": WHOLE,
    "shared_expert": GATHERED,
    "shared_experts": GATHERED,
    "shared_expert*.gate_proj": FEATURES,
    "shared_expert*.up_proj": FEATURES,
    "shared_expert*.down_proj": INPUTS,
    "shared_expert_gate": WHOLE,
}
"""In a layer with experts, which sees this rank's part of the sequence. The expert axis, not this one, cuts experts."""


def how(module: str, options: ModelOptions) -> str | None:
    """How the module of this name is split; None where nothing is said of it."""
    table, layer = DECODER | LATENT, module.split(".")
    routed = layer[:2] == ["model", "layers"] and len(layer) > 3 and options.routes(int(layer[2]))
    if routed and layer[3] == EXPERT_NAMES[options.family].layer:
        table, module = ROUTED, ".".join(layer[4:])
    return next((split for pattern, split in table.items() if fnmatchcase(module, pattern)), None)


def even(total: int, ranks: int, rank: int) -> range:
    """The part of `total` rows that is this rank's: sizes differ by one at most."""
    return range(total * rank // ranks, total * (rank + 1) // ranks)


def key_heads(options: ModelOptions, ranks: int, rank: int) -> range:
    """The key heads that this rank's query heads look at."""
    heads = options.num_key_value_heads
    return even(heads, ranks, rank) if heads >= ranks else range(heads * rank // ranks, heads * rank // ranks + 1)
