"""What a plan needs to know of a model: sizes, parameters, operations; of models by name, files and options."""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import Any

from shoal.errors import JobError, ModelError
from shoal.job.check import require
from shoal.job.model import ModelOptions
from shoal.models import config, spec
from shoal.planning import architectures

USUAL = 8192
"""Tokens of a training sequence, of models that declare a longer context and say no more."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, in features unless said.

    feed: of dense feed-forward layers. head_size: of a query's and key's head; value_size: of a value's. vocab: rows
    of the embedding; tied: the output layer uses the embedding's weights. gated: the feed-forward has three matrices,
    not two. experts: of a layer that has some, chosen: of them for a token, expert_feed: width of one, shared_feed: of
    those that all tokens go through, together. dense_layers: leading blocks without experts; all where there are none.
    latent: keys and values are made from latent_kv features (queries from latent_q, unless 0), and rope_size of a
    head's features carry position (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1). positions: rows of a table of
    learned positions. sequence: tokens of one in training. vectors: parameters that are in no matrix (norms, biases).
    """

    name: str
    layers: int
    hidden: int
    feed: int
    heads: int
    key_heads: int
    head_size: int
    vocab: int
    gated: bool
    tied: bool
    experts: int
    chosen: int
    expert_feed: int
    shared_feed: int
    dense_layers: int
    latent: bool
    latent_q: int
    latent_kv: int
    rope_size: int
    value_size: int
    positions: int = 0
    sequence: int = 2048
    vectors: int = 0

    @property
    def columns(self) -> dict[str, float]:
        """By the names of `work.MODEL`; all but the sequence, which a plan is asked for."""
        beside = {"name", "positions", "sequence", "vectors"}
        return {field.name: float(getattr(self, field.name)) for field in fields(self) if field.name not in beside}

    @property
    def attention(self) -> int:
        """Weights in the matrices of a block's attention."""
        o = self.heads * self.value_size * self.hidden
        if not self.latent:
            return self.hidden * (self.heads * self.head_size + self.key_heads * (self.head_size + self.value_size)) + o
        queries = self.heads * self.head_size
        q = self.latent_q * (self.hidden + queries) if self.latent_q else self.hidden * queries
        made = self.heads * (self.head_size - self.rope_size + self.value_size)
        return q + self.hidden * (self.latent_kv + self.rope_size) + self.latent_kv * made + o

    @property
    def expert(self) -> int:
        """Weights of one expert."""
        return (2 + self.gated) * self.hidden * self.expert_feed

    @property
    def _common(self) -> int:
        """Weights of all blocks' matrices but those of experts that tokens are routed to."""
        routed = self.layers - self.dense_layers
        beside = routed * self.hidden * (self.experts + (2 + self.gated) * self.shared_feed)
        dense = self.dense_layers * (2 + self.gated) * self.hidden * self.feed
        return self.layers * self.attention + dense + beside

    @property
    def parameters(self) -> int:
        """All that are learned; a tied embedding counts once."""
        tables = (2 - self.tied) * self.vocab + self.positions
        experts = (self.layers - self.dense_layers) * self.experts * self.expert
        return self._common + experts + tables * self.hidden + self.vectors

    @property
    def active(self) -> int:
        """Of the parameters, those that one token meets: all but the experts that are not chosen for it."""
        return self.parameters - (self.layers - self.dense_layers) * (self.experts - self.chosen) * self.expert

    def flops_per_token(self, sequence: int) -> float:
        """Of forward and backward, in a sequence of so many tokens; counted as by `models.spec.flops_per_token`."""
        experts = (self.layers - self.dense_layers) * self.chosen * self.expert
        multiplied = self._common + experts + self.vocab * self.hidden
        heads = self.layers * self.heads * (self.head_size + self.value_size)
        return 6.0 * multiplied + 3.0 * heads * sequence


def of_options(options: ModelOptions, name: str = "the job's model") -> Shape:
    """Of a job's model. JobError where the size of its vocabulary is still the tokenizer's to say."""
    fix = "give model.vocab_size (the tokenizer's number of tokens)"
    require(options.vocab_size > 0, "model.vocab_size is not known before the tokenizer is", fix)
    o, experts = options, options.num_experts
    dense = min(o.first_k_dense_replace, o.num_hidden_layers) if experts else o.num_hidden_layers
    # Blocks of a kind are alike: one of each is enough, where all of a large model's experts take long.
    kinds = [(0, dense)] * (dense > 0) + [(o.num_hidden_layers - 1, o.num_hidden_layers - dense)] * (experts > 0)
    small = o.hidden_size
    for layer, number in kinds:
        small += number * sum(prod(s.shape) for s in spec.block_parameters(o, layer).values() if _vector(s))
    return Shape(
        name, o.num_hidden_layers, o.hidden_size, o.intermediate_size, o.num_attention_heads, o.num_key_value_heads,
        o.head_size, o.vocab_size, gated=True, tied=o.tie_word_embeddings, experts=experts,
        chosen=o.num_experts_per_tok if experts else 0, expert_feed=o.expert_size if experts else 0,
        shared_feed=o.shared_expert_intermediate_size, dense_layers=dense, latent=o.kv_lora_rank > 0,
        latent_q=o.q_lora_rank, latent_kv=o.kv_lora_rank, rope_size=o.qk_rope_head_dim, value_size=o.value_size,
        sequence=min(o.max_position_embeddings, USUAL), vectors=small,
    )  # fmt: skip


def _vector(found: spec.ParameterSpec) -> bool:
    """A gate of one row, which Qwen's shared expert has, is no matrix either."""
    return found.learned and (len(found.shape) == 1 or found.shape[0] == 1)


def of_config(found: Mapping[str, Any], name: str, where: str) -> Shape:
    """Of what a config.json says, of a family that shoal trains or of another one that it can plan. ModelError with
    `where` for what is missing, absurd, or would make another model of it."""
    kind = found.get("model_type")
    if kind in config.FAMILIES:
        return _plausible(of_options(config.from_hf(dict(found), where), name), where)
    known = (*config.FAMILIES, *architectures.KINDS)
    if kind not in known:
        what = f"model_type={kind!r} is no kind of model that can be planned"
        raise ModelError(what, where=where, fix=f"known: {', '.join(known)}")
    sizes = architectures.sizes(found, where)
    return _plausible(Shape(name, **sizes | {"sequence": min(sizes["sequence"], USUAL)}), where)


def _plausible(shape: Shape, where: str) -> Shape:
    """No model is far from that large. (One that is would take an enumeration of layouts for ever.)"""
    large = {"layers": 10_000, "experts": 100_000}
    for name in (field.name for field in fields(shape)):
        size = getattr(shape, name)
        most = large.get(name, 10_000_000)
        if type(size) is int and size > most and name != "vectors":
            raise ModelError(f"{name} is {size}, more than {most}", where=where, fix="give the model's own sizes")
    return shape


@functools.cache
def tables() -> Mapping[str, Mapping[str, Any]]:
    """models.toml, by name."""
    return tomllib.loads(files("shoal.planning").joinpath("models.toml").read_text(encoding="utf-8"))


@functools.cache
def _names() -> Mapping[str, str]:
    """Plain spelling -> name: `Llama-3.1-8B` is llama3-8b, which says that it is also called so."""
    return {_plain(one): name for name, table in tables().items() for one in (name, *table.get("also", ()))}


def _plain(text: str) -> str:
    return text.lower().replace("-", "").replace("_", "")


def named(text: str) -> Shape:
    """A model of models.toml by name, else of a config.json, or of the folder that has one, by its path. JobError with
    the nearest names where it is neither; ModelError for what is wrong in the file."""
    name = _names().get(_plain(text))
    if name is not None:
        table = tables()[name]
        return replace(of_config(table["config"], name, f"models.toml: {name}"), sequence=table["sequence"])
    path = Path(text).expanduser()
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        return of_config(config.read_json(path), path.parent.name or path.name, str(path))
    if path.suffix == ".json":
        raise JobError(
            "there is no such file", where=str(path), fix="give a model's name, or the path of its config.json"
        )
    plain = difflib.get_close_matches(_plain(text.rpartition("/")[2]), _names(), n=3, cutoff=0.5)
    near = ", ".join(dict.fromkeys(_names()[one] for one in plain)) or ", ".join(tables())
    fix = f"one of {near}; or the path of a config.json"
    raise JobError(f"no model is called {text!r}", fix=fix)
