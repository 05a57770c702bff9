"""config.json: what transformers writes is understood, what is not supported is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from shoal.errors import JobError, ModelError
from shoal.job import Job
from shoal.job.data import DataOptions
from shoal.job.model import ModelOptions
from shoal.models import config
from tests.models import tiny

# As published, in transformers 4's words.
LLAMA_3_2_1B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
SMOLLM2_135M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}


def test_published_configs() -> None:
    llama = config.from_hf(LLAMA_3_2_1B)
    assert (llama.hidden_size, llama.head_size, llama.num_key_value_heads) == (2048, 64, 8)
    assert json.loads(llama.rope_scaling) == LLAMA_3_2_1B["rope_scaling"]
    assert llama.tie_word_embeddings
    smol = config.from_hf(SMOLLM2_135M)
    assert (smol.rope_theta, smol.rope_scaling, smol.head_size) == (100000.0, "", 64)


@pytest.mark.parametrize("case", tiny.CASES)
def test_round_trips_through_transformers(case: str) -> None:
    """Ours -> LlamaConfig of transformers 5 -> its own words -> ours."""
    options = tiny.CASES[case]
    theirs = LlamaConfig(**config.to_hf(options, start_token=2, end_token=3)).to_dict()
    assert (theirs["bos_token_id"], theirs["eos_token_id"]) == (2, 3)
    back = config.from_hf(theirs)
    assert json.loads(back.rope_scaling or "{}") == json.loads(options.rope_scaling or "{}")
    assert replace(back, rope_scaling="") == replace(options, head_dim=options.head_size, rope_scaling="")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "mamba"}, "model_type='mamba'"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type='longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "factor=None"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale_all_dim": 1.0}}, "mscale_all_dim"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear"}}, "factor=None"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as raised:
        config.from_hf(SMOLLM2_135M | change, where="there/config.json")
    assert named in str(raised.value)
    assert "there/config.json" in str(raised.value)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"bits": 4, "quant_method": "gptq"}, "quant_method='gptq'"),
        ({"quant_method": "awq"}, "quant_method='awq'"),
        ({"load_in_4bit": True, "quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'"),
        ({"quant_method": "fp8"}, "weight_block_size=None"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, "weight_block_size=[128, 0]"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"}, "fmt='e5m2'"),
        (
            {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "static"},
            "activation_scheme='static'",
        ),
        ("fp8", "quantization_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_quantisations_are_refused_with_what_works(said: Any, named: str) -> None:
    with pytest.raises(ModelError) as raised:
        config.from_hf(SMOLLM2_135M | {"quantization_config": said}, where="there/config.json")
    assert named in str(raised.value)
    assert "fp8 in blocks" in raised.value.fix


def test_missing_keys_are_named() -> None:
    with pytest.raises(ModelError, match="vocab_size, hidden_size"):
        config.from_hf({k: v for k, v in SMOLLM2_135M.items() if k not in ("vocab_size", "hidden_size")})


@pytest.mark.parametrize("text", ["", "{", "[1]", "\udcff"])
def test_damaged_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ModelError, match=r"config\.json"):
        config.read(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: there is no such file"):
        config.read(tmp_path)


@pytest.mark.parametrize(
    ("scaling", "named"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"rope_type": "llamma3"}', "did you mean 'llama3'"),
        ('{"rope_type": "linear"}', "factor=None"),
        ('{"rope_type": "linear", "factor": true}', "factor=True"),
        ('{"rope_type": "linear", "factor": 0}', "factor=0"),
        (tiny.LLAMA3.replace("4.0", "0.5"), "low_freq_factor"),
        (tiny.YARN.replace("beta_fast", "beta_fastest"), "did you mean 'beta_fast'"),
        (tiny.YARN.replace('fast": 4.0', 'fast": 0.5'), "beta_slow is not less than beta_fast"),
        (tiny.YARN.replace('fast": 4.0', 'fast": null'), "beta_fast=None is not a number"),
        (tiny.YARN_IN_FULL.replace("1.3", "-1.3"), "attention_factor=-1.3 is not positive"),
        (tiny.YARN_IN_FULL.replace("false", "0"), "truncate=0"),
    ],
)
def test_bad_rope_scaling_is_refused(scaling: str, named: str) -> None:
    with pytest.raises(Exception, match="rope_scaling") as raised:
        ModelOptions(rope_scaling=scaling).validate()
    assert named in str(raised.value)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Of a model with heads of 64, a context of 128 and scaled positions."""
    published = LLAMA_3_2_1B | {"max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(published))
    return str(tmp_path)


def test_architecture_is_that_of_the_weights(folder: str) -> None:
    found = config.architecture(Job(model=ModelOptions(weights=folder), data=DataOptions(sequence_length=128)))
    assert found.model == replace(config.read(Path(folder)), weights=folder)
    assert found.data == DataOptions(sequence_length=128)
    assert config.architecture(found) == found
    assert config.architecture(Job()) == Job()


def test_options_that_agree_with_the_weights_are_accepted(folder: str) -> None:
    scaling = json.dumps(dict(reversed(LLAMA_3_2_1B["rope_scaling"].items())), indent=1)
    agreeing = ModelOptions(
        weights=folder, hidden_size=2048, num_attention_heads=32, head_dim=64, rope_scaling=scaling
    )  # fmt: skip
    job = Job(model=agreeing, data=DataOptions(sequence_length=128)).validate()
    assert config.architecture(job).model == replace(config.read(Path(folder)), weights=folder)
    published = {key: value for key, value in LLAMA_3_2_1B.items() if key != "head_dim"}
    (Path(folder) / "config.json").write_text(json.dumps(published))
    assert config.architecture(job).model.head_size == 64, "said by the folder as hidden_size / num_attention_heads"


def test_options_are_not_held_against_defaults_where_there_are_weights(folder: str) -> None:
    """9 heads do not go with the default of 2 for keys and values, which nobody has asked for."""
    job = Job(model=ModelOptions(weights=folder, num_attention_heads=9), data=DataOptions(sequence_length=128))
    with pytest.raises(JobError, match="num_attention_heads=9, but theirs is 32"):
        config.architecture(job.validate())
    with pytest.raises(JobError, match=r"is not a multiple of model\.num_key_value_heads=2"):
        replace(job, model=replace(job.model, weights="")).validate()
    (Path(folder) / "config.json").write_text(json.dumps(LLAMA_3_2_1B | {"num_key_value_heads": 5}))
    with pytest.raises(ModelError, match=r"is not a multiple of model\.num_key_value_heads=5"):
        config.architecture(Job(model=ModelOptions(weights=folder)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_hidden_layers": 4}, ["model.num_hidden_layers=4, but theirs is 16"]),
        ({"vocab_size": 257, "rope_theta": 5e3}, ["vocab_size=257, but theirs is 128256", "rope_theta=5000.0, but"]),
        ({"tie_word_embeddings": False}, ["tie_word_embeddings=False, but theirs is True"]),
        ({"head_dim": 32}, ["head_dim=32, but theirs is 64"]),
        ({"rope_scaling": '{"rope_type": "linear", "factor": 2.0}'}, ["linear", "llama3"]),
        ({"max_position_embeddings": 4096}, ["max_position_embeddings=4096, but theirs is 128"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_contradict_the_weights_are_refused(options: dict[str, Any], said: list[str], folder: str) -> None:
    with pytest.raises(JobError) as raised:
        config.architecture(Job(model=ModelOptions(weights=folder, **options), data=DataOptions(sequence_length=128)))
    for words in (*said, folder):
        assert words in str(raised.value)


def test_sequences_longer_than_the_context_of_the_weights_are_refused(folder: str) -> None:
    """Only once the folder has been read: before, its context is not known."""
    job = Job(model=ModelOptions(weights=folder), data=DataOptions(sequence_length=129)).validate()
    with pytest.raises(JobError, match=r"sequence_length=129 .*max_position_embeddings=128") as raised:
        config.architecture(job)
    assert raised.value.fix == "take data.sequence_length=128 or less"
