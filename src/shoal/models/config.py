"""Hugging Face's config.json <-> ModelOptions. What shoal does not compute is refused by name, never
ignored."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from shoal.errors import JobError, ModelError
from shoal.job import Job
from shoal.job.check import fit, kinds
from shoal.job.job import check_context
from shoal.job.model import ROPE_KEYS, ROPE_MORE, TRAINING, ModelOptions
from shoal.models.families import DEFAULTS, FAMILIES, NEUTRAL, REQUIRED, odd_keys, odd_options


def architecture(job: Job) -> Job:
    """The job with the architecture of the folder in model.weights; as it is, where there is none.

    Raises ModelError for that folder, and JobError for options that differ from it and from the default (a default
    cannot be told from nothing said), or for sequences that are longer than its context.
    """
    if not job.model.weights:
        return job
    found = replace(read(Path(job.model.weights)), weights=job.model.weights)
    found = replace(found, **{name: getattr(job.model, name) for name in TRAINING})
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
    found.validate_whole()
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
    """The options of a config of one of `FAMILIES`, in the words of transformers 4 or 5. Raises ModelError; `where` is
    for it."""
    name = config.get("model_type")
    if name not in FAMILIES:
        known = "'llama' (Llama 2 and 3, SmolLM2), " + ", ".join(repr(other) for other in FAMILIES if other != "llama")
        raise ModelError(f"model_type={name!r} is not supported", where=where, fix=f"known: {known}")
    family = FAMILIES[name]
    storage(config, where)
    _refuse_what_is_not_computed(config, NEUTRAL | family.neutral, where)
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise ModelError(f"{', '.join(missing)} not given", where=where, fix="fetch the file again")
    usual = DEFAULTS | {"num_key_value_heads": config["num_attention_heads"]} | family.defaults
    keys = {option: option for option in usual} | family.keys
    values = {key: config[key] for key in REQUIRED} | {"family": name}
    for said in (keys, family.renamed):
        values |= {option: config[key] for option, key in said.items() if config.get(key) is not None}
    theta, scaling = _rope(config, usual["rope_theta"], where)
    values = usual | values | {"rope_theta": theta, "rope_scaling": scaling} | odd_options(name, config)
    types = kinds(ModelOptions)
    try:
        options = ModelOptions(**{key: fit(key, value, types[key]) for key, value in values.items()})
        options.validate()
    except JobError as error:
        raise ModelError(error.what, where=where, fix=error.fix) from None
    _refuse_what_is_not_computed(config, {key: (value, None) for key, value in odd_keys(options).items()}, where)
    return options


class Storage(NamedTuple):
    """How a folder stores its weights.

    block: rows and columns of an fp8 weight that share a scale; None where no weight is in fp8. further: numbers of the
    layers that predict further tokens (Gloeckle et al. 2024, arXiv:2404.19737; DeepSeek-V3, section 2.2), behind the
    model's own; they are not computed.
    """

    block: tuple[int, int] | None
    further: range


def storage(config: dict[str, Any], where: str = "config.json") -> Storage:
    """What a config says of how its weights are stored. Raises ModelError; `where` is for it."""
    layers = config.get("num_hidden_layers", 0)
    count = config.get("num_nextn_predict_layers", config.get("num_mtp_layers")) or 0
    if not isinstance(layers, int) or not isinstance(count, int) or count < 0:
        what = f"num_hidden_layers={layers!r}, num_nextn_predict_layers={count!r} are no numbers of layers"
        raise ModelError(what, where=where, fix="fetch the file again")
    return Storage(_block(config.get("quantization_config"), where), range(layers, layers + count))


def _block(said: Any, where: str) -> tuple[int, int] | None:
    if said is None:
        return None
    said = said if isinstance(said, dict) else {}
    kept = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    found = [f"{key}={said.get(key)!r}" for key, value in kept.items() if said.get(key, value) != value]
    match said.get("weight_block_size"):
        case [int(rows), int(columns)] if not found and "quant_method" in said and rows > 0 and columns > 0:
            return rows, columns
        case other:
            odd = found[0] if found else f"weight_block_size={other!r}"
    raise ModelError(
        f"quantization_config with {odd} is not supported",
        where=where,
        fix="what works: no quantisation, or fp8 in blocks as DeepSeek publishes it (quant_method fp8, fmt e4m3, "
        "weight_block_size [128, 128]); save another model dequantised, with transformers",
    )


def _refuse_what_is_not_computed(config: dict[str, Any], neutral: dict[str, tuple[Any, ...]], where: str) -> None:
    for key, values in neutral.items():
        if key in config and config[key] not in values:
            raise ModelError(f"{key}={config[key]!r} is not supported", where=where, fix=f"known: {values[0]!r}")
    other = set(config.get("layer_types") or ()) - {"full_attention"}
    if other:
        raise ModelError(f"layer_types with {min(other)!r} are not supported", where=where, fix="known: full_attention")


def _rope(config: dict[str, Any], usual: float, where: str) -> tuple[float, str]:
    """Base and scaling: `rope_parameters` in transformers 5; `rope_theta` and `rope_scaling` before."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", usual))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    if kind not in ROPE_KEYS:
        raise ModelError(f"rope_type={kind!r} is not supported", where=where, fix=f"known: {', '.join(ROPE_KEYS)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("partial_rotary_factor is not supported", where=where, fix="known: 1.0")
    if kind != "yarn" and rope.get("mscale_all_dim"):
        raise ModelError(f"mscale_all_dim with rope_type={kind!r} is not supported", where=where, fix="known: yarn")
    if kind == "default":
        return theta, ""
    if kind in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    more = {key: rope[key] for key in ROPE_MORE.get(kind, ()) if rope.get(key) is not None}
    return theta, json.dumps({"rope_type": kind} | {key: rope.get(key) for key in ROPE_KEYS[kind]} | more)


def to_hf(
    options: ModelOptions,
    dtype: str = "float32",
    start_token: int | None = None,
    end_token: int | list[int] | None = None,
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 read. start_token, end_token: ids that begin and end a document."""
    family = FAMILIES[options.family]
    return {
        "architectures": [family.kind],
        "model_type": options.family,
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
        "attention_dropout": 0.0,
        "initializer_range": options.initializer_range,
        "torch_dtype": dtype,
        "bos_token_id": start_token,
        "eos_token_id": end_token,
        "pad_token_id": None,
        "use_cache": True,
        **family.written,
        **{key: getattr(options, option) for option, key in family.keys.items()},
        **odd_keys(options),
    }
