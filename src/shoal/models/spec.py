"""Shapes, first values and costs of a model, without torch and without building it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from shoal.job.model import ModelOptions
from shoal.ops.fill import ONES, ZEROS, Fill


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter: its whole shape, and what it holds before training."""

    shape: tuple[int, ...]
    fill: Fill


def parameters(options: ModelOptions) -> dict[str, ParameterSpec]:
    """Canonical (Hugging Face) name -> spec, in the order of the forward pass. A tied output layer is not
    listed.

    Matrices start normal with std initializer_range; the two of each block that write to the residual stream
    with that over sqrt(2 · blocks), so that its size does not grow with depth (Radford et al. 2019, "Language
    Models are Unsupervised Multitask Learners", section 2.3).
    """
    assert options.vocab_size > 0, "model.vocab_size is still to be resolved"
    width, std = options.hidden_size, options.initializer_range
    inner, into_residual = Fill(std=std), Fill(std=std / (2 * options.num_hidden_layers) ** 0.5)
    specs = {"model.embed_tokens.weight": ParameterSpec((options.vocab_size, width), inner)}

    def linear(name: str, outputs: int, inputs: int, bias: bool, fill: Fill = inner) -> None:
        specs[f"{name}.weight"] = ParameterSpec((outputs, inputs), fill)
        if bias:
            specs[f"{name}.bias"] = ParameterSpec((outputs,), ZEROS)

    queries = options.num_attention_heads * options.head_size
    keys = options.num_key_value_heads * options.head_size
    for layer in range(options.num_hidden_layers):
        block = f"model.layers.{layer}"
        specs[f"{block}.input_layernorm.weight"] = ParameterSpec((width,), ONES)
        linear(f"{block}.self_attn.q_proj", queries, width, options.attention_bias)
        linear(f"{block}.self_attn.k_proj", keys, width, options.attention_bias)
        linear(f"{block}.self_attn.v_proj", keys, width, options.attention_bias)
        linear(f"{block}.self_attn.o_proj", width, queries, options.attention_bias, into_residual)
        specs[f"{block}.post_attention_layernorm.weight"] = ParameterSpec((width,), ONES)
        linear(f"{block}.mlp.gate_proj", options.intermediate_size, width, options.mlp_bias)
        linear(f"{block}.mlp.up_proj", options.intermediate_size, width, options.mlp_bias)
        linear(f"{block}.mlp.down_proj", width, options.intermediate_size, options.mlp_bias, into_residual)
    specs["model.norm.weight"] = ParameterSpec((width,), ONES)
    if not options.tie_word_embeddings:
        linear("lm_head", options.vocab_size, width, bias=False)
    return specs


def count(options: ModelOptions) -> int:
    """Number of parameters; a tied embedding counts once."""
    return sum(prod(spec.shape) for spec in parameters(options).values())


def flops_per_token(options: ModelOptions, sequence_length: int) -> float:
    """Floating-point operations of one token's forward and backward, in a sequence of this many tokens.

        6 · M + 6 · blocks · heads · head_size · sequence_length

    M: weights that are multiplied, the output layer included and the embedding's lookup not; 2 operations
    each in forward and 4 in backward. Second term: products of attention, where a token sees half the
    sequence on average: half of the 12 · blocks · heads · head_size · length of Chowdhery et al. 2022
    ("PaLM", appendix B), which counts what a causal mask hides. Recomputed activations do not count (MFU, not
    HFU).
    """
    matrices = {name: spec for name, spec in parameters(options).items() if len(spec.shape) == 2}
    multiplied = sum(prod(spec.shape) for spec in matrices.values())
    if not options.tie_word_embeddings:
        multiplied -= prod(matrices["model.embed_tokens.weight"].shape)
    heads = options.num_hidden_layers * options.num_attention_heads * options.head_size
    return 6.0 * multiplied + 6.0 * heads * sequence_length
