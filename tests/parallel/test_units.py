"""Units of modules that shoal does not know: the blocks that a person would choose, none inside another."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoal.parallel.units import units
from tests.parallel.test_partition import Residual, ResNet, mlp


def tiny(name: str) -> nn.Module:
    """A Hugging Face module built from a configuration on meta, without download."""
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 3}
    gpt2 = {"n_layer": 3, "n_embd": 8, "n_head": 2, "vocab_size": 13, "bos_token_id": 0, "eos_token_id": 0}
    t5 = {"num_layers": 2, "d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 16, "vocab_size": 13}
    options = {
        "GPT2LMHead": gpt2,
        "BertForMaskedLM": {"vocab_size": 13, **common},
        "ViT": {"image_size": 8, "patch_size": 4, **common},
        "T5ForConditionalGeneration": t5,
    }[name]
    family = next(f for f in ("GPT2", "Bert", "ViT", "T5") if name.startswith(f))
    model = name if "For" in name else f"{name}Model"
    with torch.device("meta"):
        return getattr(transformers, model)(getattr(transformers, f"{family}Config")(**options))


def names(module: nn.Module) -> list[str]:
    of = {part: name for name, part in module.named_modules()}
    return [of[unit] for unit in units(module)]


@pytest.mark.parametrize("hint", [True, False])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GPT2LMHead", [f"transformer.h.{i}" for i in range(3)]),
        ("BertForMaskedLM", [f"bert.encoder.layer.{i}" for i in range(3)]),
        ("ViT", [f"layers.{i}" for i in range(3)]),
        ("T5ForConditionalGeneration", [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)]),
    ],
)
def test_blocks_of_hugging_face_modules(name: str, expected: list[str], hint: bool):
    """Found with the names that the module gives, and without."""
    module = tiny(name)
    if not hint:
        for part in module.modules():
            part._no_split_modules = None
    assert names(module) == expected


def test_blocks_of_a_residual_network_lie_in_several_containers():
    class Staged(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.layer1 = nn.Sequential(Residual(4, 4, 1), Residual(4, 4, 1))
            self.layer2 = nn.Sequential(Residual(4, 8, 2), Residual(8, 8, 1))

    assert names(Staged()) == ["layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    assert names(ResNet()) == ["layers.0", "layers.1", "layers.2"]


def test_single_layers_are_no_blocks():
    assert units(mlp()) == []
    assert units(nn.Linear(2, 2)) == []


def experts(blocks: int) -> nn.Module:
    def expert() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.experts = nn.Linear(4, 4), nn.ModuleList(expert() for _ in range(4))

    return nn.Sequential(nn.Linear(4, 4), *(Block() for _ in range(blocks)))


def test_the_outer_of_nested_blocks_is_taken():
    """Experts run only where tokens choose them: as units they would gather on some ranks only, and hang."""
    assert names(experts(2)) == ["1", "2"]


def test_small_repeated_parts_stay_with_the_rest():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 64) for _ in range(2))
            self.heads = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    assert names(Heads()) == ["body.0", "body.1"]


def test_a_block_that_shares_a_parameter_is_left_out():
    module = nn.Module()
    module.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(4))
    module.head = nn.Linear(4, 4)
    module.head.weight = module.blocks[3][0].weight
    module.blocks[1][0].bias = module.blocks[0][0].bias
    assert names(module) == ["blocks.2"]


def test_a_block_that_is_used_several_times_is_one_unit():
    block, other = (nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))
    assert names(nn.Sequential(block, other, block)) == ["0", "1"]
