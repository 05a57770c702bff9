"""config.json of families that shoal does not train but can plan: GPT-2's kind, and dense Llamas by other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shoal.errors import JobError, ModelError
from shoal.job.check import fit

# Our size -> the key of config.json. Of those that may be left out, see `sizes`.
_GPT2 = {
    "layers": "n_layer", "hidden": "n_embd", "heads": "n_head", "vocab": "vocab_size", "sequence": "n_positions",
    "feed": "n_inner",
}  # fmt: skip
_LLAMA = {
    "layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads", "vocab": "vocab_size",
    "sequence": "max_position_embeddings", "feed": "intermediate_size", "key_heads": "num_key_value_heads",
    "head_size": "head_dim",
}  # fmt: skip
_NEOX = {key: _LLAMA[key] for key in ("layers", "hidden", "heads", "vocab", "sequence", "feed")}
_BLOOM = {"layers": "n_layer", "hidden": "hidden_size", "heads": "n_head", "vocab": "vocab_size"}
KINDS = {
    "gpt2": _GPT2, "gpt_neox": _NEOX, "bloom": _BLOOM, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA,
}  # fmt: skip
"""By model_type."""

# Keys under which the model is another one than its sizes say, with the values under which it is not.
_NEUTRAL: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "gpt2": {"add_cross_attention": (None, False)},
    "gpt_neox": {"attention_bias": (None, True)},
    "mistral": {"sliding_window": (None,)},
    "qwen2": {"use_sliding_window": (None, False)},
    "qwen3": {"use_sliding_window": (None, False), "attention_bias": (None, False)},
}
# As published files of the family write them, where transformers has another word.
_OTHER = {"hidden_size": ("n_embed",), "n_layer": ("num_hidden_layers",), "n_head": ("num_attention_heads",)}
_TIED = ("gpt2", "bloom")


def sizes(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of a `shapes.Shape`, but for its name. ModelError, with `where`, says which keys are missing, or what
    of them is no size."""
    kind = config["model_type"]
    for key, values in _NEUTRAL.get(kind, {}).items():
        if config.get(key) not in values:
            other = "null" if values[-1] is None else str(values[-1]).lower()
            fix = f"set {key} to {other} in a copy, and what it saves or costs is left out of the plan"
            raise ModelError(f"{key}={config[key]!r} cannot be planned", where=where, fix=fix)
    odd = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if odd:
        fix = "leave layer_types out in a copy, and what it saves or costs is left out of the plan"
        raise ModelError(f"layer_types with {odd[0]!r} cannot be planned", where=where, fix=fix)
    found = {name: _size(config, key, where) for name, key in KINDS[kind].items()}
    if kind == "bloom":
        found["sequence"] = _size(config, "seq_length", where) or 2048
    optional = {"key_heads", "head_size"} | ({"feed"} if kind == "gpt2" else set())
    lacks = [KINDS[kind][name] for name, size in found.items() if size is None and name not in optional]
    if lacks:
        raise ModelError(f"{', '.join(lacks)} not given", where=where, fix="give it, or fetch the file again")
    return _whole(kind, config, found, where)


def _whole(kind: str, config: Mapping[str, Any], found: dict[str, Any], where: str) -> dict[str, Any]:
    hidden, heads = found["hidden"], found["heads"]
    key_heads, size = found.get("key_heads") or heads, found.get("head_size") or hidden // heads
    if heads % key_heads or (found.get("head_size") is None and hidden % heads):
        what = f"{heads} heads share neither {key_heads} key heads nor {hidden} features evenly"
        raise ModelError(what, where=where, fix="give the model's own sizes")
    gated = KINDS[kind] is _LLAMA
    full = {
        **found, "feed": found.get("feed") or 4 * hidden, "key_heads": key_heads, "head_size": size, "gated": gated,
        "tied": bool(config.get("tie_word_embeddings", kind in _TIED)), "experts": 0, "chosen": 0, "expert_feed": 0,
        "shared_feed": 0, "dense_layers": found["layers"], "latent": False, "latent_q": 0, "latent_kv": 0,
        "rope_size": 0, "value_size": size, "positions": found["sequence"] if kind == "gpt2" else 0,
    }  # fmt: skip
    return full | {"vectors": _vectors(kind, full)}


def _vectors(kind: str, of: Mapping[str, Any]) -> int:
    """Weights of norms and biases. Llama's kind: two norms a block and one more, scales alone; Qwen's queries, keys and
    values have biases (2) or norms of a head (3). GPT-2's kind: norms have a bias, and all matrices of blocks;
    BLOOM has a norm behind its embedding."""
    hidden, rows = of["hidden"], (of["heads"] + 2 * of["key_heads"]) * of["head_size"]
    if KINDS[kind] is _LLAMA:
        more = {"mistral": 0, "qwen2": rows, "qwen3": 2 * of["head_size"]}[kind]
        return int(of["layers"] * (2 * hidden + more) + hidden)
    block = 4 * hidden + rows + hidden + of["feed"] + hidden
    return int(of["layers"] * block + 2 * hidden * (2 if kind == "bloom" else 1))


def _size(config: Mapping[str, Any], key: str, where: str) -> int | None:
    """None where it is left out, or null."""
    value = next((config[one] for one in (key, *_OTHER.get(key, ())) if config.get(one) is not None), None)
    if value is None:
        return None
    try:
        size = int(fit(key, value, int))
    except JobError as error:
        raise ModelError(error.what, where=where, fix=error.fix) from None
    if size < 1:
        raise ModelError(f"{key}={size} is less than 1", where=where, fix="give 1 or more")
    return size
