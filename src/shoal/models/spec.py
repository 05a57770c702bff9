"""Shapes, first values and costs of a model, without torch and without building it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from shoal.job.model import ModelOptions
from shoal.ops.fill import ONES, ZEROS, Fill


@dataclass(frozen=True)
class ParameterSpec:
    """One tensor: its whole shape, and what it holds before training.

    share: part of the tokens that are multiplied with it (an expert's: those routed to it, on average).
    learned: False for a state of the model that has no gradient and that no optimizer touches.
    """

    shape: tuple[int, ...]
    fill: Fill
    share: float = 1.0
    learned: bool = True


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls the parts of its feed-forward layers with experts; `shared` = "" where it has none."""

    layer: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = ""


EXPERT_NAMES = {
    "mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": ExpertNames(shared="shared_expert"),
    "qwen3_moe": ExpertNames(),
    "deepseek_v2": ExpertNames(shared="shared_experts"),
    "deepseek_v3": ExpertNames(shared="shared_experts"),
}
"""By family, as published: transformers 5 fuses experts in memory, but neither reads nor writes them so."""


def parameters(options: ModelOptions) -> dict[str, ParameterSpec]:
    """Canonical (Hugging Face) name -> spec, in the order of the forward pass. A tied output layer is not
    listed.

    Matrices start normal with std initializer_range; those of each block that write to the residual stream
    with that over sqrt(2 · blocks), so that its size does not grow with depth (Radford et al. 2019, "Language
    Models are Unsupervised Multitask Learners", section 2.3).
    """
    assert options.vocab_size > 0, "model.vocab_size is still to be resolved"
    embedding = ParameterSpec((options.vocab_size, options.hidden_size), Fill(std=options.initializer_range))
    specs = {"model.embed_tokens.weight": embedding}
    for layer in range(options.num_hidden_layers):
        specs |= {f"model.layers.{layer}.{name}": spec for name, spec in block_parameters(options, layer).items()}
    specs["model.norm.weight"] = ParameterSpec((options.hidden_size,), ONES)
    if not options.tie_word_embeddings:
        specs["lm_head.weight"] = embedding
    return specs


def block_parameters(options: ModelOptions, layer: int) -> dict[str, ParameterSpec]:
    """Those of one block, by their names in it."""
    norm = ParameterSpec((options.hidden_size,), ONES)
    feed_forward = _experts if options.routes(layer) else _dense
    return {
        "input_layernorm.weight": norm,
        **(_latent_attention if options.kv_lora_rank else _attention)(options),
        "post_attention_layernorm.weight": norm,
        **feed_forward(options),
    }


def _linear(
    options: ModelOptions, name: str, outputs: int, inputs: int, bias: bool = False, residual: bool = False
) -> dict[str, ParameterSpec]:
    """residual: whether it writes to the residual stream."""
    std = options.initializer_range / ((2 * options.num_hidden_layers) ** 0.5 if residual else 1.0)
    specs = {f"{name}.weight": ParameterSpec((outputs, inputs), Fill(std=std))}
    return specs | ({f"{name}.bias": ParameterSpec((outputs,), ZEROS)} if bias else {})


def _attention(options: ModelOptions) -> dict[str, ParameterSpec]:
    o, size = options, options.head_size
    queries, keys, bias = o.num_attention_heads * size, o.num_key_value_heads * size, o.attention_bias or o.qkv_bias
    specs = _linear(o, "self_attn.q_proj", queries, o.hidden_size, bias)
    specs |= _linear(o, "self_attn.k_proj", keys, o.hidden_size, bias)
    specs |= _linear(o, "self_attn.v_proj", keys, o.hidden_size, bias)
    specs |= _linear(o, "self_attn.o_proj", o.hidden_size, queries, o.attention_bias, residual=True)
    if o.family == "qwen3_moe":
        specs |= {f"self_attn.{name}.weight": ParameterSpec((size,), ONES) for name in ("q_norm", "k_norm")}
    return specs


def _latent_attention(options: ModelOptions) -> dict[str, ParameterSpec]:
    o, heads = options, options.num_attention_heads
    specs: dict[str, ParameterSpec] = {}
    if o.q_lora_rank:
        specs |= _linear(o, "self_attn.q_a_proj", o.q_lora_rank, o.hidden_size, o.attention_bias)
        specs["self_attn.q_a_layernorm.weight"] = ParameterSpec((o.q_lora_rank,), ONES)
        specs |= _linear(o, "self_attn.q_b_proj", heads * o.head_size, o.q_lora_rank)
    else:
        specs |= _linear(o, "self_attn.q_proj", heads * o.head_size, o.hidden_size)
    latent = o.kv_lora_rank + o.qk_rope_head_dim
    specs |= _linear(o, "self_attn.kv_a_proj_with_mqa", latent, o.hidden_size, o.attention_bias)
    specs["self_attn.kv_a_layernorm.weight"] = ParameterSpec((o.kv_lora_rank,), ONES)
    specs |= _linear(o, "self_attn.kv_b_proj", heads * (o.qk_nope_head_dim + o.v_head_dim), o.kv_lora_rank)
    specs |= _linear(o, "self_attn.o_proj", o.hidden_size, heads * o.v_head_dim, o.attention_bias, residual=True)
    return specs


def _dense(options: ModelOptions) -> dict[str, ParameterSpec]:
    return _gated(options, "mlp", options.intermediate_size, bias=options.mlp_bias)


def _gated(
    options: ModelOptions, name: str, size: int, bias: bool = False, as_named: ExpertNames = ExpertNames()
) -> dict[str, ParameterSpec]:
    specs = _linear(options, f"{name}.{as_named.gate}", size, options.hidden_size, bias)
    specs |= _linear(options, f"{name}.{as_named.up}", size, options.hidden_size, bias)
    return specs | _linear(options, f"{name}.{as_named.down}", options.hidden_size, size, bias, residual=True)


def _experts(options: ModelOptions) -> dict[str, ParameterSpec]:
    o, names = options, EXPERT_NAMES[options.family]
    specs = _linear(o, f"{names.layer}.gate", o.num_experts, o.hidden_size)
    if o.family == "deepseek_v3":
        specs[f"{names.layer}.gate.e_score_correction_bias"] = ParameterSpec((o.num_experts,), ZEROS, learned=False)
    share = o.num_experts_per_tok / o.num_experts
    for expert in range(o.num_experts):
        own = _gated(o, f"{names.layer}.experts.{expert}", o.expert_size, as_named=names)
        specs |= {name: replace(spec, share=share) for name, spec in own.items()}
    if names.shared:
        specs |= _gated(o, f"{names.layer}.{names.shared}", o.shared_expert_intermediate_size)
    if o.family == "qwen2_moe":
        specs |= _linear(o, f"{names.layer}.shared_expert_gate", 1, o.hidden_size)
    return specs


def count(options: ModelOptions) -> int:
    """Number of parameters; a tied embedding counts once, and what is not learned does not."""
    return sum(prod(spec.shape) for spec in parameters(options).values() if spec.learned)


def flops_per_token(options: ModelOptions, sequence_length: int) -> float:
    """Floating-point operations of one token's forward and backward, in a sequence of this many tokens.

        6 · M + 3 · blocks · heads · (head_size + value_size) · sequence_length

    M: weights that are multiplied, the output layer included and the embedding's lookup not, of the routed experts
    those of num_experts_per_tok; 2 operations each in forward and 4 in backward. Second term: products of attention,
    where a token sees half the sequence on average: half of the 12 · blocks · heads · head_size · length of Chowdhery
    et al. 2022 ("PaLM", appendix B), which counts what a causal mask hides. Recomputed activations do not count (MFU,
    not HFU).
    """
    matrices = {name: spec for name, spec in parameters(options).items() if len(spec.shape) == 2}
    multiplied = sum(prod(spec.shape) * spec.share for spec in matrices.values())
    if not options.tie_word_embeddings:
        multiplied -= prod(matrices["model.embed_tokens.weight"].shape)
    heads = options.num_hidden_layers * options.num_attention_heads
    return 6.0 * multiplied + 3.0 * heads * (options.head_size + options.value_size) * sequence_length
