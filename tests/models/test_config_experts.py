"""config.json of models with experts: as published, as transformers writes it, and what of it is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding, yarn_apply_mscale

from shoal.errors import JobError, ModelError
from shoal.job import Job
from shoal.job.model import ModelOptions
from shoal.models import config
from shoal.ops.rope import attention_factor, frequencies, latent_factor
from tests.models import experts, tiny

# As published; keys that say nothing of the architecture left out.
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN1_5_MOE: dict[str, Any] = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "kv_lora_rank": 512,
    "max_position_embeddings": 8192,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 163840,
}
# DeepSeek-V2-Lite; V2 itself has q_lora_rank=1536, topk_method="group_limited_greedy", n_group=8, topk_group=3.
LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 128,
    "vocab_size": 102400,
}
# What DeepSeek-V3 and R1 say besides.
FULL: dict[str, Any] = DEEPSEEK | {
    "max_position_embeddings": 163840,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
}


def test_deepseeks_own_config_in_old_and_new_words() -> None:
    old = config.from_hf(FULL)
    assert config.storage(FULL) == ((128, 128), range(61, 62))
    scaling = json.loads(old.rope_scaling)
    assert scaling == {key: value for key, value in FULL["rope_scaling"].items() if key != "type"} | {
        "rope_type": "yarn"
    }
    theirs = AutoConfig.for_model(**{k: v for k, v in FULL.items() if k != "architectures"})
    assert config.from_hf(theirs.to_dict()) == old
    assert "rope_parameters" in theirs.to_dict()
    written = config.to_hf(old)
    assert written["rope_scaling"] == scaling
    assert written["num_nextn_predict_layers"] == 0
    assert "quantization_config" not in written
    assert config.storage(written) == (None, range(61, 61))


@pytest.mark.parametrize("factor", [1.0, 40])
@pytest.mark.parametrize("said", [{}, {"mscale": 0.7, "mscale_all_dim": 1.2}, {"mscale": 1.0, "mscale_all_dim": 1.0}])
def test_factors_of_yarn_are_transformers(factor: float, said: dict[str, float]) -> None:
    """At the sizes that are published: 64 features, 4096 positions made 163840."""
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 4096} | said
    theirs = AutoConfig.for_model(
        "deepseek_v3", rope_scaling=rope | {"rope_theta": 10000.0}, max_position_embeddings=163840
    )
    rotary = DeepseekV3RotaryEmbedding(theirs)
    assert frequencies(64, 10000.0, json.dumps(rope), torch.device("cpu")).equal(rotary.inv_freq)
    assert attention_factor(json.dumps(rope)) == pytest.approx(rotary.attention_scaling, rel=1e-15)
    assert latent_factor(json.dumps(rope)) == pytest.approx(yarn_apply_mscale(theirs.rope_parameters, 1.0), rel=1e-15)


def test_published_configs_with_experts() -> None:
    mixtral, qwen, deepseek = (config.from_hf(found) for found in (MIXTRAL_8X7B, QWEN1_5_MOE, DEEPSEEK))
    assert (mixtral.num_experts, mixtral.expert_size, mixtral.norm_topk_prob) == (8, 14336, True)
    assert mixtral.router_aux_loss_coef == ModelOptions().router_aux_loss_coef, "how to train it is not the folder's"
    assert (qwen.num_experts, qwen.expert_size, qwen.norm_topk_prob, qwen.qkv_bias) == (60, 1408, False, True)
    assert (deepseek.q_lora_rank, deepseek.head_size, deepseek.rotary_size, deepseek.value_size) == (0, 192, 64, 128)
    assert deepseek.shared_expert_intermediate_size == 2 * 1408
    lite = config.from_hf(LITE)
    assert (lite.family, lite.q_lora_rank, lite.n_group, lite.shared_expert_intermediate_size) == (
        "deepseek_v2", 0, 1, 2 * 1408
    )  # fmt: skip
    assert config.from_hf(LITE | {"n_group": 8, "topk_group": 3}) == lite, "greedy knows no groups"
    grouped = config.from_hf(LITE | {"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"})
    assert (grouped.n_group, grouped.topk_group) == (8, 3)
    assert config.to_hf(grouped)["topk_method"] == "group_limited_greedy"
    assert [deepseek.routes(layer) for layer in range(3)] == [False, True, True]


@pytest.mark.parametrize("case", experts.CASES)
def test_experts_round_trip_through_transformers(case: str) -> None:
    options = experts.CASES[case]
    words = config.to_hf(options)
    theirs = AutoConfig.for_model(words.pop("model_type"), **words).to_dict()
    sized = replace(options, head_dim=0 if options.kv_lora_rank else options.head_size)
    assert config.from_hf(theirs) == sized
    assert config.from_hf(config.to_hf(options)) == sized


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (MIXTRAL_8X7B | {"sliding_window": 4096}, "sliding_window=4096"),
        (MIXTRAL_8X7B | {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        (MIXTRAL_8X7B | {"num_experts_per_tok": 9}, "num_experts_per_tok=9"),
        (QWEN1_5_MOE | {"use_sliding_window": True}, "use_sliding_window=True"),
        (QWEN1_5_MOE | {"decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        (QWEN1_5_MOE | {"mlp_only_layers": [3]}, "mlp_only_layers=[3]"),
        (QWEN1_5_MOE | {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        (LITE | {"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        (LITE | {"norm_topk_prob": True}, "norm_topk_prob=True"),
        (LITE | {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        (DEEPSEEK | {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        (DEEPSEEK | {"topk_method": "greedy"}, "topk_method='greedy'"),
        (DEEPSEEK | {"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers='one'"),
        (DEEPSEEK | {"rope_interleave": False}, "rope_interleave=False"),
        (DEEPSEEK | {"n_shared_experts": None}, "shared_expert_intermediate_size"),
        (DEEPSEEK | {"rope_scaling": {"type": "yarn", "factor": 40, "mscale": "one"}}, "mscale='one'"),
        (DEEPSEEK | {"num_key_value_heads": 8}, "as many key as query heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_of_experts_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError) as raised:
        config.from_hf(change)
    assert named in str(raised.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (replace(tiny.BASE, num_experts=4), "model.num_experts=4 is not for family llama"),
        (replace(experts.MIXTRAL, moe_intermediate_size=8), "model.moe_intermediate_size=8 is not for family mixtral"),
        (replace(experts.QWEN3, bias_update_rate=0.001), "model.bias_update_rate=0.001 is not for family qwen3_moe"),
        (replace(experts.DEEPSEEK2, norm_topk_prob=True), "deepseek_v2 takes scores as they are"),
        (replace(experts.DEEPSEEK2, bias_update_rate=0.001), "is not for family deepseek_v2"),
        (replace(experts.QWEN3, num_experts=0), "family qwen3_moe needs model.num_experts"),
        (replace(experts.DEEPSEEK, n_group=3), "is not a multiple of model.n_group=3"),
        (replace(experts.DEEPSEEK, n_group=8), "groups of one expert"),
        (replace(experts.DEEPSEEK, topk_group=5), "model.topk_group=5 is more than"),
        (replace(experts.DEEPSEEK, topk_group=1), "model.num_experts_per_tok=3 is more than the 2 experts"),
        (replace(experts.DEEPSEEK, moe_intermediate_size=25), "is not a multiple of model.moe_intermediate_size=25"),
        (replace(experts.DEEPSEEK, qk_rope_head_dim=5), "head size 5 is odd"),
        (replace(experts.MIXTRAL, capacity_factor=-1.0), "model.capacity_factor=-1.0 is less than 0"),
        (replace(experts.MIXTRAL, family="mistral"), "did you mean 'mixtral'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_of_experts_that_do_not_fit_are_refused(options: ModelOptions, named: str) -> None:
    with pytest.raises(JobError) as raised:
        options.validate()
    assert named in str(raised.value)


def test_how_experts_are_trained_is_the_jobs(tmp_path: Path) -> None:
    """The rest is the folder's; and what does not fit it is refused once it has been read."""
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    job = Job(model=ModelOptions(weights=str(tmp_path), router_aux_loss_coef=0.5, capacity_factor=1.25)).validate()
    found = config.architecture(job).model
    assert (found.family, found.router_aux_loss_coef, found.capacity_factor) == ("mixtral", 0.5, 1.25)
    wrong = replace(job, model=replace(job.model, bias_update_rate=0.001)).validate()
    with pytest.raises(JobError, match=r"bias_update_rate=0\.001 is not for family mixtral"):
        config.architecture(wrong)
