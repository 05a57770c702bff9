"""What config.json says of each family of models, and what of it shoal computes. Data only; config.py reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from shoal.job.model import ModelOptions


@dataclass(frozen=True)
class Family:
    """kind: the class in transformers. keys: option -> its key in config.json, beside those that all have.

    defaults: option -> value where config.json leaves it out. neutral: keys that change what is computed, with the
    values under which they do not. written: keys that are written besides. renamed: option -> its key as transformers 5
    writes it, where published files have another.
    """

    kind: str
    keys: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    neutral: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    renamed: dict[str, str] = field(default_factory=dict)


REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
"""Options that every config.json gives."""

DEFAULTS: dict[str, Any] = {
    "head_dim": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "rope_theta": 10000.0,
}
"""What every config.json may leave out, with the value that then holds."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0),
    "partial_rotary_factor": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "logit_scale": (None, 1, 1.0),
    "is_encoder_decoder": (None, False),
}
"""Keys of any family that change what is computed, with the values under which they do not."""

_DENSE: dict[str, tuple[Any, ...]] = {
    "sliding_window": (None,),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "rope_interleaved": (None, False),
}
# With use_sliding_window off, Qwen's sliding_window says nothing.
_QWEN: dict[str, tuple[Any, ...]] = {"use_sliding_window": (None, False), "decoder_sparse_step": (None, 1)}
_SIZED = {key: key for key in ("moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob")}
_LATENT = {
    "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
_DEEPSEEK = {
    **_SIZED,
    "num_experts": "n_routed_experts",
    "attention_bias": "attention_bias",
    **{key: key for key in ("first_k_dense_replace", "n_group", "topk_group", "routed_scaling_factor", *_LATENT)},
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        keys={"attention_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        neutral=_DENSE,
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        keys={"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok"},
        defaults={
            "num_experts": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
        },
        neutral={"sliding_window": (None,), "router_jitter_noise": (None, 0, 0.0)},
        written={"sliding_window": None},
    ),
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        keys={
            **_SIZED,
            "num_experts": "num_experts",
            "shared_expert_intermediate_size": "shared_expert_intermediate_size",
            "qkv_bias": "qkv_bias",
        },
        defaults={
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "norm_topk_prob": False,
            "qkv_bias": True,
            "max_position_embeddings": 32768,
        },
        neutral=_QWEN,
        written={"use_sliding_window": False, "decoder_sparse_step": 1},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        keys={**_SIZED, "num_experts": "num_experts", "attention_bias": "attention_bias"},
        defaults={
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "max_position_embeddings": 32768,
        },
        neutral=_QWEN,
        written={"use_sliding_window": False, "decoder_sparse_step": 1},
        renamed={"num_experts": "num_local_experts"},
    ),
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        keys=_DEEPSEEK,
        defaults={
            **_LATENT,
            "num_experts": 64,
            "moe_intermediate_size": 1407,
            "norm_topk_prob": False,
        },
        neutral={
            "mlp_bias": (None, False),
            "norm_topk_prob": (None, False),
            "scoring_func": (None, "softmax"),
            "moe_layer_freq": (None, 1),
        },
        written={"scoring_func": "softmax", "moe_layer_freq": 1},
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        keys=_DEEPSEEK,
        defaults={
            **_LATENT,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "max_position_embeddings": 4096,
        },
        neutral={
            "rope_interleave": (None, True),
            "scoring_func": (None, "sigmoid"),
            "topk_method": (None, "noaux_tc"),
            "moe_layer_freq": (None, 1),
        },
        written={
            "rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1,
            "num_nextn_predict_layers": 0,
        },
    ),
}  # fmt: skip


def odd_options(family: str, config: dict[str, Any]) -> dict[str, Any]:
    """Options that this family's config.json says in a way of its own."""
    found: dict[str, Any] = {}
    if family in ("qwen2_moe", "qwen3_moe"):
        # Any layers may be dense there; shoal knows the first ones. What else it says is refused by `odd_keys`.
        found["first_k_dense_replace"] = len(config.get("mlp_only_layers") or [])
    if family in ("deepseek_v2", "deepseek_v3"):
        number, size = (2, 1407) if family == "deepseek_v2" else (1, 2048)
        found["q_lora_rank"] = config.get("q_lora_rank", 1536) or 0
        size = config.get("moe_intermediate_size", size)
        found["shared_expert_intermediate_size"] = (config.get("n_shared_experts", number) or 0) * size
        found["head_dim"] = 0
    if family == "deepseek_v2" and config.get("topk_method", "greedy") == "greedy":
        found |= {"n_group": 1, "topk_group": 1}  # whatever it says of groups
    return found


def odd_keys(options: ModelOptions) -> dict[str, Any]:
    """The keys of config.json that `odd_options` reads."""
    if options.family in ("qwen2_moe", "qwen3_moe"):
        return {"mlp_only_layers": list(range(options.first_k_dense_replace))}
    if options.family in ("deepseek_v2", "deepseek_v3"):
        said = {
            "q_lora_rank": options.q_lora_rank or None,
            "n_shared_experts": options.shared_expert_intermediate_size // options.moe_intermediate_size,
            "head_dim": options.qk_rope_head_dim,
        }
        grouped = "group_limited_greedy" if options.n_group > 1 else "greedy"
        return said | ({"topk_method": grouped} if options.family == "deepseek_v2" else {})
    return {}
