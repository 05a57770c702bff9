"""Models by name, file and options: against published counts, transformers on meta, and what shoal trains with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.errors import JobError, ModelError
from shoal.job.model import ModelOptions
from shoal.models import spec
from shoal.planning import shapes, work
from tests.models import experts, tiny

NAMES = list(shapes.tables())
# One of each kind that transformers builds.
ONE_OF_EACH = (
    "gpt2", "gpt-neox-20b", "bloom-176b", "mistral-7b", "qwen2.5-7b", "qwen2.5-0.5b", "qwen3-0.6b", "llama2-7b",
    "llama3-405b", "mixtral-8x7b", "deepseek-v2", "deepseek-v3", "qwen3-30b-a3b", "1t-moe",
)  # fmt: skip
DENSE = ONE_OF_EACH[:9]


def cut(name: str) -> dict[str, Any]:
    """Its config with few layers, of each kind that it has."""
    config = dict(shapes.tables()[name]["config"])
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    return config | {layers: config.get("first_k_dense_replace", 0) + 2}


def built(config: dict[str, Any]) -> torch.nn.Module:
    """By transformers, without memory."""
    more = {"attn_implementation": "eager"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, **more), **more)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_as_many_as_published(name: str) -> None:
    table, shape = shapes.tables()[name], shapes.named(name)
    assert table["source"]
    if "parameters" in table:
        assert shape.parameters == table["parameters"]
    elif "billions" in table:
        assert shape.parameters / 1e9 == pytest.approx(table["billions"], abs=0.05)
    else:
        assert table["source"] == "made up"


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mixtral-8x7b", 12.9), ("mixtral-8x22b", 39.1), ("deepseek-v2", 21.4), ("deepseek-v3", 37.6),
        ("qwen3-30b-a3b", 3.3), ("qwen3-235b-a22b", 22.2), ("llama2-7b", 6.7),
    ],
)  # fmt: skip
def test_active_parameters_are_as_many_as_published(name: str, billions: float) -> None:
    assert shapes.named(name).active / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_parameters_are_as_many_as_transformers_builds(name: str) -> None:
    config = cut(name)
    model = built(config)
    biases = sum(p.numel() for n, p in model.named_parameters() if "e_score_correction_bias" in n)
    assert shapes.of_config(config, name, "here").parameters == sum(p.numel() for p in model.parameters()) - biases


@pytest.mark.parametrize("name", DENSE)
def test_operations_are_those_that_transformers_runs(name: str) -> None:
    """It computes all of attention's square, of which a causal mask hides half, and a product for its rotations."""
    config, length = cut(name), 64
    shape = shapes.of_config(config, name, "here")
    # A whole mask: it would look into a tensor to make one. BLOOM looks at none, and makes positions from it.
    mask = {} if name.startswith("bloom") else {"attention_mask": torch.zeros(1, 1, length, length, device="meta")}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        built(config)(torch.zeros(1, length, dtype=torch.long, device="meta"), use_cache=False, **mask)
    hidden = shape.layers * shape.heads * (shape.head_size + shape.value_size) * length**2
    ours = shape.flops_per_token(length) * length / 3 + hidden
    assert counter.get_total_flops() == pytest.approx(ours, rel=1e-6)


@pytest.mark.parametrize("options", [*tiny.CASES.values(), *experts.CASES.values()], ids=str)
def test_a_jobs_model_is_counted_as_training_counts_it(options: ModelOptions) -> None:
    shape = shapes.of_options(options)
    assert shape.parameters == spec.count(options)
    # But for the gate of Qwen2's shared expert, which is one row.
    gates = 6 * (shape.layers - shape.dense_layers) * shape.hidden * (options.family == "qwen2_moe")
    for length in (16, 4096):
        assert shape.flops_per_token(length) + gates == pytest.approx(spec.flops_per_token(options, length), rel=1e-12)


def test_dense_layers_in_front_are_not_more_than_all() -> None:
    options = replace(experts.CASES["deepseek_v3"], first_k_dense_replace=99)
    shape = shapes.of_options(options)
    assert shape.dense_layers == shape.layers
    assert shape.parameters == shape.active == spec.count(options)


def test_columns_are_those_of_a_candidate() -> None:
    assert set(work.MODEL) <= set(shapes.named("gpt2").columns) | {"sequence"}
    found = shapes.named("deepseek-v3").columns
    assert (found["experts"], found["dense_layers"], found["latent"], found["head_size"]) == (256, 3, 1, 192)


@pytest.mark.parametrize("name", NAMES)
def test_a_candidates_operations_are_the_models(name: str) -> None:
    shape, batch, length = shapes.named(name), 4, 4096
    row = dict.fromkeys(work.COLUMNS, 1.0) | shape.columns | {"global_batch": batch, "sequence": length}
    found = work.of_rows([row], ["h100"], ["shoal"]).model_flops[0]
    assert found == pytest.approx(shape.flops_per_token(length) * batch * length, rel=1e-12)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_the_file_that_transformers_writes_is_the_same_model(name: str, tmp_path: Path) -> None:
    window = {"sliding_window": None} if name.startswith("mi") else {}
    AutoConfig.for_model(**shapes.tables()[name]["config"], **window).save_pretrained(tmp_path)
    there, known = shapes.named(str(tmp_path)), shapes.named(name)
    assert replace(there, name=name, sequence=known.sequence) == known
    assert shapes.named(str(tmp_path / "config.json")) == there
    assert there.sequence <= shapes.USUAL


def test_names_are_found_however_they_are_spelt() -> None:
    assert shapes.named("Llama-3.1-405B").name == "llama3-405b"
    assert shapes.named("Qwen2.5-7B").name == "qwen2.5-7b"
    # No two models by one spelling.
    spelt = [shapes._plain(one) for name, table in shapes.tables().items() for one in (name, *table.get("also", ()))]
    assert len(spelt) == len(set(spelt))


@pytest.mark.parametrize(
    ("text", "fix"),
    [
        ("llama3-8", "llama3-8b"), ("Mixtral", "mixtral-8x7b"), ("meta-llama/Llama-3-70", "llama3-70b"),
        ("nothing of the kind", "gpt3-175b"),
    ],
)  # fmt: skip
def test_another_name_is_refused_with_the_nearest(text: str, fix: str) -> None:
    with pytest.raises(JobError, match="no model is called") as refused:
        shapes.named(text)
    assert fix in refused.value.fix
    assert "config.json" in refused.value.fix


GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 128, "vocab_size": 1000}
LLAMA = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
    "max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": "gpt2", "n_embd": 64}, "n_layer, n_head, vocab_size, n_positions not given"),
        ({**GPT2, "n_layer": 0}, "n_layer=0 is less than 1"),
        ({**GPT2, "n_embd": "64"}, "n_embd='64' is not a whole number"),
        ({**GPT2, "n_embd": -64}, "n_embd=-64 is less than 1"),
        ({**GPT2, "n_head": 5}, "5 heads share neither 5 key heads nor 64 features evenly"),
        ({**GPT2, "n_layer": 20_000}, "layers is 20000, more than 10000"),
        ({**LLAMA, "model_type": "llama", "hidden_size": 2**40}, "hidden is 1099511627776, more than 10000000"),
        ({"model_type": "llama", "hidden_size": 64}, "vocab_size, intermediate_size, num_hidden_layers"),
        ({**LLAMA, "model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096 cannot be planned"),
        ({**LLAMA, "model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "layer_types with"),
        ({**LLAMA, "model_type": "qwen3", "num_key_value_heads": 3}, "4 heads share neither 3 key heads"),
        ({**LLAMA, "model_type": "gemma2"}, "model_type='gemma2' is no kind of model"),
        (LLAMA, "model_type=None"),
        ([], "holds no JSON object"),
    ],
)
def test_a_file_that_is_no_model_is_refused_by_what_is_wrong(config: Any, what: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError) as refused:
        shapes.named(str(path))
    assert what in refused.value.what
    assert refused.value.where == str(path)
    assert refused.value.fix


def test_what_is_not_there_or_not_known_yet_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "config.json", tmp_path):
        with pytest.raises(JobError, match="there is no such file") as refused:
            shapes.named(str(path))
        assert refused.value.where == str(tmp_path / "config.json")
    with pytest.raises(JobError, match=r"vocab_size is not known"):
        shapes.of_options(ModelOptions())


def test_the_page_lists_all_models() -> None:
    page = (Path(__file__).parents[2] / "docs/planning-models.md").read_text(encoding="utf-8")
    for name in NAMES:
        shape = shapes.named(name)
        sizes = f"{shape.parameters / 1e9:.2f} | {shape.active / 1e9:.2f} | {shape.layers} | {shape.hidden}"
        assert f"| `{name}` | {sizes} | {shape.sequence} |" in page
