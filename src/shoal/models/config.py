"""Hugging Face's config.json <-> ModelOptions. What shoal does not compute is refused by name, never
ignored."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from shoal.errors import JobError, ModelError
from shoal.job import Job
from shoal.job.check import fit, kinds
from shoal.job.job import check_context
from shoal.job.model import ROPE_KEYS, ModelOptions

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

# Options that change what is computed, with the values under which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, 0.0),
    "sliding_window": (None,),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "quantization_config": (None,),
    "rope_interleaved": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "no_rope_layers": (None, []),
    "logit_scale": (None, 1, 1.0),
    "is_encoder_decoder": (None, False),
}


def architecture(job: Job) -> Job:
    """The job with the architecture of the folder in model.weights; as it is, where there is none.

    Raises ModelError for that folder, and JobError for options that differ from it and from the default (a default
    cannot be told from nothing said), or for sequences that are longer than its context.
    """
    if not job.model.weights:
        return job
    found = replace(read(Path(job.model.weights)), weights=job.model.weights)
    said = asdict(found) | {"head_dim": found.head_size}
    if _scaling(job.model) == _scaling(found):
        said["rope_scaling"] = job.model.rope_scaling
    usual = ModelOptions()
    against = [
        f"model.{name}={given!r}, but theirs is {said[name]!r}"
        for name, given in asdict(job.model).items()
        if given not in (getattr(usual, name), said[name])
    ]
    if against:
        raise JobError(
            f"the weights have another architecture: {'; '.join(against)}",
            where=job.model.weights,
            fix="leave such options out: with model.weights, the architecture is the folder's",
        )
    job = replace(job, model=found)
    check_context(job)
    return job


def _scaling(options: ModelOptions) -> Any:
    return json.loads(options.rope_scaling) if options.rope_scaling else None


def read(folder: Path) -> ModelOptions:
    """The architecture in `folder`/config.json. Raises ModelError naming the file and what is wrong in it."""
    return from_hf(read_json(folder / "config.json"), where=str(folder / "config.json"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder. Raises ModelError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            "there is no such file",
            where=str(path),
            fix="give a folder in Hugging Face's format, with all its files",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot be read: {error}", where=str(path), fix="fetch the file again") from None
    if not isinstance(value, dict):
        raise ModelError("holds no JSON object", where=str(path), fix="fetch the file again")
    return value


def from_hf(config: dict[str, Any], where: str = "config.json") -> ModelOptions:
    """The options of a Llama-like config, in the words of transformers 4 or 5. Raises ModelError; `where` is
    for it."""
    kind = config.get("model_type")
    if kind != "llama":
        raise ModelError(
            f"model_type={kind!r} is not supported",
            where=where,
            fix="known: 'llama' (Llama 2 and 3, SmolLM2)",
        )
    for key, neutral in _NEUTRAL.items():
        if key in config and config[key] not in neutral:
            raise ModelError(f"{key}={config[key]!r} is not supported", where=where, fix=f"known: {neutral[0]!r}")
    missing = [key for key in _REQUIRED if key not in config]
    if missing:
        raise ModelError(f"{', '.join(missing)} not given", where=where, fix="fetch the file again")
    theta, scaling = _rope(config, where)
    defaults = {
        "num_key_value_heads": config["num_attention_heads"],
        "head_dim": 0,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
    }
    values = {key: config[key] for key in _REQUIRED}
    values |= {key: default if config.get(key) is None else config[key] for key, default in defaults.items()}
    values |= {"rope_theta": theta, "rope_scaling": scaling}
    known = kinds(ModelOptions)
    try:
        options = ModelOptions(**{key: fit(key, value, known[key]) for key, value in values.items()})
        options.validate()
    except JobError as error:
        raise ModelError(error.what, where=where, fix=error.fix) from None
    return options


def _rope(config: dict[str, Any], where: str) -> tuple[float, str]:
    """Base and scaling: `rope_parameters` in transformers 5; `rope_theta` and `rope_scaling` before."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ROPE_KEYS:
        raise ModelError(f"rope_type={kind!r} is not supported", where=where, fix=f"known: {', '.join(ROPE_KEYS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("partial_rotary_factor is not supported", where=where, fix="known: 1.0")
    if kind == "default":
        return theta, ""
    if kind == "llama3":
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return theta, json.dumps({"rope_type": kind} | {key: rope.get(key) for key in ROPE_KEYS[kind]})


def to_hf(
    options: ModelOptions,
    dtype: str = "float32",
    start_token: int | None = None,
    end_token: int | list[int] | None = None,
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read. start_token, end_token: ids that begin and end a document."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": options.vocab_size,
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "num_hidden_layers": options.num_hidden_layers,
        "num_attention_heads": options.num_attention_heads,
        "num_key_value_heads": options.num_key_value_heads,
        "head_dim": options.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": options.max_position_embeddings,
        "rope_theta": options.rope_theta,
        "rope_scaling": _scaling(options),
        "rms_norm_eps": options.rms_norm_eps,
        "tie_word_embeddings": options.tie_word_embeddings,
        "attention_bias": options.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": options.mlp_bias,
        "initializer_range": options.initializer_range,
        "torch_dtype": dtype,
        "bos_token_id": start_token,
        "eos_token_id": end_token,
        "pad_token_id": None,
        "use_cache": True,
    }
