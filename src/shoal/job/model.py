"""Which model is trained: its architecture in Hugging Face's words, and where its first weights come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from shoal.errors import JobError
from shoal.job.check import at_least, one_of, positive, require

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Kinds of rotary scaling that are known, and the numbers that each needs."""

ROPE_MORE: dict[str, tuple[str, ...]] = {
    "yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
}
"""What may be said besides; a number each, but for `truncate`."""

FAMILIES = ("llama", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3")

TRAINING = ("router_aux_loss_coef", "bias_update_rate", "capacity_factor")
"""Options that say how experts are trained, not what the model is: a folder's config.json does not decide them."""

# Options that only some families have, in the words of their config.json. Elsewhere they keep their defaults.
_ROUTED = FAMILIES[1:]
_DEEPSEEK = ("deepseek_v2", "deepseek_v3")
_SIZED = ("qwen2_moe", "qwen3_moe", *_DEEPSEEK)
_ONLY = {
    "attention_bias": ("llama", "qwen3_moe", *_DEEPSEEK),
    "mlp_bias": ("llama",),
    "qkv_bias": ("qwen2_moe",),
    "num_experts": _ROUTED,
    "capacity_factor": _ROUTED,
    "moe_intermediate_size": _SIZED,
    "norm_topk_prob": _SIZED,
    "first_k_dense_replace": _SIZED,
    "shared_expert_intermediate_size": ("qwen2_moe", *_DEEPSEEK),
    "bias_update_rate": ("deepseek_v3",),
    **dict.fromkeys(
        ("n_group", "topk_group", "routed_scaling_factor", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
         "qk_rope_head_dim", "v_head_dim"),
        _DEEPSEEK,
    ),
}  # fmt: skip
# Options without which a family is none.
_NEEDED = {
    "mixtral": ("num_experts",),
    "qwen2_moe": ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size"),
    "qwen3_moe": ("num_experts", "moe_intermediate_size"),
    **dict.fromkeys(
        _DEEPSEEK,
        ("num_experts", "moe_intermediate_size", "shared_expert_intermediate_size", "kv_lora_rank",
         "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ModelOptions:
    """A decoder-only transformer. The defaults make a Llama of 5 M parameters, with a vocabulary of 4096."""

    family: str = "llama"
    """Model family: `llama` (Llama 2/3, SmolLM2); with experts `mixtral`, `qwen2_moe`, `qwen3_moe`,
    `deepseek_v2` or `deepseek_v3`."""
    weights: str = ""
    """Hugging Face folder to start from (config.json and safetensors); empty = random initialisation.
    With a folder, the options below are read from it, and refused where they say otherwise."""
    vocab_size: int = 0
    """Rows of the embedding; 0 = the tokenizer's size."""
    hidden_size: int = 256
    """Width of the residual stream, in features."""
    intermediate_size: int = 688
    """Width of the feed-forward layer, in features."""
    num_hidden_layers: int = 6
    """Decoder blocks."""
    num_attention_heads: int = 4
    """Query heads per block."""
    num_key_value_heads: int = 2
    """Key and value heads per block; divides num_attention_heads."""
    head_dim: int = 0
    """Features per head; 0 = hidden_size / num_attention_heads."""
    max_position_embeddings: int = 2048
    """Longest context the model declares, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary position frequencies."""
    rope_scaling: str = ""
    """Rotary scaling as JSON in Hugging Face's words: `linear` with factor; `llama3` with factor,
    low_freq_factor, high_freq_factor and original_max_position_embeddings; or `yarn` with factor and
    original_max_position_embeddings, and if need be attention_factor, beta_fast, beta_slow, mscale,
    mscale_all_dim, truncate; e.g. '{"rope_type":"linear","factor":2.0}'; empty = none."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as output layer too."""
    attention_bias: bool = False
    """Biases in the query, key, value and output projections."""
    mlp_bias: bool = False
    """Biases in the feed-forward projections."""
    qkv_bias: bool = False
    """Biases in the query, key and value projections only (qwen2_moe)."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""
    num_experts: int = 0
    """Experts that tokens are routed to in each feed-forward layer; 0 = a dense model."""
    num_experts_per_tok: int = 2
    """Experts that each token is routed to."""
    moe_intermediate_size: int = 0
    """Width of each expert, in features; 0 = intermediate_size, as in Mixtral."""
    shared_expert_intermediate_size: int = 0
    """Width of the experts that every token goes through, together; 0 = none."""
    first_k_dense_replace: int = 0
    """The first blocks that have a dense feed-forward layer, of width intermediate_size, instead of experts."""
    norm_topk_prob: bool = True
    """Divide the weights of a token's experts by their sum."""
    n_group: int = 1
    """Groups of experts; a token is routed within the best `topk_group` of them."""
    topk_group: int = 1
    """Groups that each token is routed within."""
    routed_scaling_factor: float = 1.0
    """What the weights of a token's experts are multiplied by."""
    q_lora_rank: int = 0
    """Latent attention: features that queries are made from; 0 = from the residual stream itself."""
    kv_lora_rank: int = 0
    """Latent attention: features that keys and values are made from; 0 = no latent attention."""
    qk_nope_head_dim: int = 0
    """Latent attention: features of a query or key head without position."""
    qk_rope_head_dim: int = 0
    """Latent attention: features of a query head with position, and of the key that all heads share."""
    v_head_dim: int = 0
    """Latent attention: features of a value head."""
    router_aux_loss_coef: float = 0.001
    """Weight of the balance loss, which is 1 where a sequence uses all experts alike; 0 = none."""
    bias_update_rate: float = 0.0
    """By how much a step moves each expert's bias towards balance (deepseek_v3; there 0.001); 0 = not at all."""
    capacity_factor: float = 0.0
    """Tokens that an expert takes from each sequence in training, in multiples of its even share; later ones pass
    it by. 0 = no limit."""

    @property
    def head_size(self) -> int:
        """Features of a query or key head."""
        if self.kv_lora_rank:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """Features of a head that are rotated by position."""
        return self.qk_rope_head_dim if self.kv_lora_rank else self.head_size

    @property
    def value_size(self) -> int:
        """Features of a value head."""
        return self.v_head_dim if self.kv_lora_rank else self.head_size

    @property
    def expert_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    def routes(self, layer: int) -> bool:
        """Whether this block, counted from 0, has experts."""
        return self.num_experts > 0 and layer >= self.first_k_dense_replace

    def validate(self) -> None:
        one_of("model.family", self.family, FAMILIES)
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings", "num_experts_per_tok", "n_group",
                     "topk_group"):  # fmt: skip
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("vocab_size", "head_dim", "num_experts", "moe_intermediate_size", "first_k_dense_replace",
                     "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
                     "qk_rope_head_dim", "v_head_dim", *TRAINING):  # fmt: skip
            at_least(f"model.{name}", getattr(self, name), 0)
        for name in ("rope_theta", "rms_norm_eps", "initializer_range", "routed_scaling_factor"):
            positive(f"model.{name}", getattr(self, name))
        if not self.weights:  # else what was not given is the folder's
            self.validate_whole()
        if self.rope_scaling:
            self._validate_rope()

    def validate_whole(self) -> None:
        """Do the options go together? Of a model whose weights are in a folder, once that has been read."""
        self._validate_family()
        if self.num_experts:
            self._validate_experts()
        self._validate_heads()

    def _validate_family(self) -> None:
        for name, families in _ONLY.items():
            require(
                self.family in families or getattr(self, name) == getattr(ModelOptions, name),
                f"model.{name}={getattr(self, name)!r} is not for family {self.family}",
                f"leave it out, or take model.family={' or '.join(families)}",
            )
        for name in _NEEDED.get(self.family, ()):
            require(getattr(self, name) > 0, f"family {self.family} needs model.{name}", f"give model.{name}")

    def _validate_experts(self) -> None:
        require(
            self.num_experts % self.n_group == 0,
            f"model.num_experts={self.num_experts} is not a multiple of model.n_group={self.n_group}",
            "groups have equal size",
        )
        group = self.num_experts // self.n_group
        require(
            self.n_group == 1 or group > 1,
            f"model.n_group={self.n_group} makes groups of one expert",
            "a group is judged by its best two: take fewer groups",
        )
        require(
            self.topk_group <= self.n_group,
            f"model.topk_group={self.topk_group} is more than model.n_group={self.n_group}",
            "take some of the groups, or all",
        )
        within = self.topk_group * group
        require(
            self.num_experts_per_tok <= within,
            f"model.num_experts_per_tok={self.num_experts_per_tok} is more than the {within} experts to choose from",
            f"take {within} or fewer",
        )
        if self.family == "deepseek_v2":
            require(not self.norm_topk_prob, "deepseek_v2 takes scores as they are", "take model.norm_topk_prob=false")
        if self.family in _DEEPSEEK:
            require(
                self.shared_expert_intermediate_size % self.expert_size == 0,
                f"model.shared_expert_intermediate_size={self.shared_expert_intermediate_size} is not a multiple of "
                f"model.moe_intermediate_size={self.moe_intermediate_size}",
                "it counts shared experts, each as wide as the others",
            )

    def _validate_heads(self) -> None:
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"model.num_attention_heads={self.num_attention_heads} is not a multiple of "
            f"model.num_key_value_heads={self.num_key_value_heads}",
            "choose a divisor of the heads",
        )
        if self.kv_lora_rank:
            require(
                self.num_key_value_heads == self.num_attention_heads and not self.head_dim,
                "latent attention has as many key as query heads, and sizes of its own",
                f"take model.num_key_value_heads={self.num_attention_heads}, and no model.head_dim",
            )
        require(
            bool(self.kv_lora_rank or self.head_dim) or self.hidden_size % self.num_attention_heads == 0,
            f"model.hidden_size={self.hidden_size} is not a multiple of "
            f"model.num_attention_heads={self.num_attention_heads}",
            "choose such a width, or give model.head_dim",
        )
        require(self.rotary_size % 2 == 0, f"head size {self.rotary_size} is odd", "rotary positions need an even one")

    def _validate_rope(self) -> None:
        try:
            rope = json.loads(self.rope_scaling)
        except json.JSONDecodeError as error:
            raise JobError(
                f"model.rope_scaling is not JSON: {error}", fix='e.g. {"rope_type":"linear","factor":2.0}'
            ) from None
        require(isinstance(rope, dict), f"model.rope_scaling={rope!r} is not a JSON object", "write {...}")
        one_of("model.rope_scaling: rope_type", kind := rope.get("rope_type"), ROPE_KEYS)
        needed, more = ROPE_KEYS[kind], ROPE_MORE.get(kind, ())
        for key in rope:
            one_of("model.rope_scaling: key", key, ("rope_type", *needed, *more))
        for key in (*needed, *(key for key in more if key in rope and key != "truncate")):
            value = rope.get(key)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(number, f"model.rope_scaling: {key}={value!r} is not a number", f"{kind} needs one")
            if key.startswith("mscale"):
                at_least(f"model.rope_scaling: {key}", rope[key], 0)
            else:
                positive(f"model.rope_scaling: {key}", rope[key])
        truncate = rope.get("truncate", True)
        require(isinstance(truncate, bool), f"model.rope_scaling: truncate={truncate!r}", "take true or false")
        _increase(rope, "low_freq_factor", "high_freq_factor", "Llama 3.1 has 1.0 and 4.0")
        _increase({"beta_slow": 1, "beta_fast": 32} | rope, "beta_slow", "beta_fast", "the paper has 1 and 32")


def _increase(rope: dict[str, Any], low: str, high: str, usual: str) -> None:
    if low in rope and high in rope:
        require(rope[low] < rope[high], f"model.rope_scaling: {low} is not less than {high}", usual)
