"""Which model is trained: its architecture in Hugging Face's words, and where its first weights come from."""

from __future__ import annotations

import json
from dataclasses import dataclass

from shoal.errors import JobError
from shoal.job.check import at_least, one_of, positive, require

ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Kinds of rotary scaling that are known, and the numbers that each needs."""


@dataclass(frozen=True)
class ModelOptions:
    """A decoder-only transformer. The defaults make a Llama of 5 M parameters, with a vocabulary of 4096."""

    family: str = "llama"
    """Model family: `llama` (Llama 2/3, SmolLM2)."""
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
    """Rotary scaling as JSON in Hugging Face's words: `linear` with factor, or `llama3` with factor,
    low_freq_factor, high_freq_factor and original_max_position_embeddings; e.g.
    '{"rope_type":"linear","factor":2.0}'; empty = none."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = True
    """Use the embedding matrix as output layer too."""
    attention_bias: bool = False
    """Biases in the query, key, value and output projections."""
    mlp_bias: bool = False
    """Biases in the feed-forward projections."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def validate(self) -> None:
        one_of("model.family", self.family, ("llama",))
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings"):  # fmt: skip
            at_least(f"model.{name}", getattr(self, name), 1)
        for name in ("vocab_size", "head_dim"):
            at_least(f"model.{name}", getattr(self, name), 0)
        if not self.weights:  # else what was not given is the folder's, whose heads are checked when it is read
            self._validate_heads()
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            positive(f"model.{name}", getattr(self, name))
        if self.rope_scaling:
            self._validate_rope()

    def _validate_heads(self) -> None:
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"model.num_attention_heads={self.num_attention_heads} is not a multiple of "
            f"model.num_key_value_heads={self.num_key_value_heads}",
            "choose a divisor of the heads",
        )
        require(
            bool(self.head_dim) or self.hidden_size % self.num_attention_heads == 0,
            f"model.hidden_size={self.hidden_size} is not a multiple of "
            f"model.num_attention_heads={self.num_attention_heads}",
            "choose such a width, or give model.head_dim",
        )
        require(self.head_size % 2 == 0, f"head size {self.head_size} is odd", "rotary positions need an even one")

    def _validate_rope(self) -> None:
        try:
            rope = json.loads(self.rope_scaling)
        except json.JSONDecodeError as error:
            raise JobError(
                f"model.rope_scaling is not JSON: {error}", fix='e.g. {"rope_type":"linear","factor":2.0}'
            ) from None
        require(isinstance(rope, dict), f"model.rope_scaling={rope!r} is not a JSON object", "write {...}")
        one_of("model.rope_scaling: rope_type", rope.get("rope_type"), ROPE_KEYS)
        for key in ROPE_KEYS[rope["rope_type"]]:
            value = rope.get(key)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(
                number,
                f"model.rope_scaling: {key}={value!r} is not a number",
                f"{rope['rope_type']} needs it",
            )
            positive(f"model.rope_scaling: {key}", rope[key])
        if rope["rope_type"] == "llama3":
            require(
                rope["low_freq_factor"] < rope["high_freq_factor"],
                "model.rope_scaling: low_freq_factor is not less than high_freq_factor",
                "Llama 3.1 has 1.0 and 4.0",
            )
