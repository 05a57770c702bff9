"""Models with experts against transformers': logits and all gradients, within 1e-5 of their norms in float32; from
files that transformers wrote, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from shoal.checkpoint import huggingface
from shoal.models import build, config, decoder
from shoal.models.decoder import Decoder
from shoal.models.moe import Router
from shoal.ops import rope, route
from shoal.shard import Shard
from tests.models import experts, tiny

BOUND = 1e-5


def distance(a: Tensor, b: Tensor) -> float:
    """Of the difference's norm from that of b."""
    return ((a - b).norm() / b.norm()).item()


def published(name: str, folder: Path) -> nn.Module:
    """A random model of transformers' own, and its folder of safetensors."""
    words = config.to_hf(experts.CASES[name]) | {"initializer_range": 0.2}
    torch.manual_seed(0)
    twin = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(words.pop("model_type"), **words), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        # Norms start at one and biases at zero, where errors could hide.
        for tensor in (*twin.parameters(), *(b for n, b in twin.named_buffers() if n.endswith("correction_bias"))):
            if tensor.ndim == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    twin.save_pretrained(folder)
    return twin


def loaded(folder: Path) -> Decoder:
    model = build(config.read(folder))
    whole = [Shard(n, tuple(t.shape), (0,) * t.ndim, t.detach()) for n, t in experts.canonical(model)]
    huggingface.load(folder, whole)
    return model.eval()


def published_gradients(twin: nn.Module, family: str) -> Iterator[tuple[str, Tensor]]:
    """By the names in the files; in memory, transformers 5 fuses experts."""
    gate, up, down = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, parameter in twin.named_parameters():
        gradient = parameter.grad
        assert gradient is not None
        if family == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if ".experts." not in name:
            yield name, gradient
        elif name.endswith("gate_up_proj"):
            for expert, both in enumerate(gradient):
                for kind, one in zip((gate, up), both.chunk(2), strict=True):
                    yield name.replace("gate_up_proj", f"{expert}.{kind}.weight"), one
        else:
            for expert, one in enumerate(gradient):
                yield name.replace("experts.down_proj", f"experts.{expert}.{down}.weight"), one


def compare(name: str, folder: Path) -> tuple[float, float]:
    """Distance of logits, and the largest of all gradients', from transformers'."""
    twin, tokens_BL = published(name, folder), tiny.tokens(3, 40)
    model = loaded(folder)
    ours, theirs = model(tokens_BL), twin(tokens_BL).logits
    for logits_BLV in (ours, theirs):
        F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten()).backward()
    gradients = dict(published_gradients(twin, model.options.family))
    found = {n: g for n, g in experts.canonical(model, gradients=True) if not n.endswith("correction_bias")}
    assert found.keys() == gradients.keys()
    assert all(g.norm() > 1e-6 for g in gradients.values()), "no gradient to compare"
    return distance(ours, theirs), max(distance(found[n], g) for n, g in gradients.items())


@pytest.mark.parametrize("name", experts.CASES)
def test_equals_transformers(name: str, tmp_path: Path) -> None:
    logits, gradients = compare(name, tmp_path)
    assert logits < BOUND
    assert gradients < BOUND


def _scores_with_bias(select: Callable[..., Any]) -> Callable[..., Any]:
    def bug(self: Router, scores_BLE: Tensor) -> tuple[Tensor, Tensor]:
        return select(self, scores_BLE + self.e_score_correction_bias)

    return bug


BUGS: dict[str, tuple[str, Any, str, Any]] = {
    "weights not normalised": ("mixtral", route, "weights", lambda s, i, n, scale: _weights(s, i, False, scale)),
    "normalised where not asked": ("qwen2_moe", route, "weights", lambda s, i, n, scale: _weights(s, i, True, scale)),
    "weights not scaled": ("deepseek_v3", route, "weights", lambda s, i, n, scale: _weights(s, i, n, 1.0)),
    "bias in the weights too": ("deepseek_v3", Router, "select", _scores_with_bias(Router.select)),
    "bias left out": ("deepseek_v3", route, "select", lambda s, k, b, g, kept: _select(s, k, None, g, kept)),
    "groups judged by two": (
        "deepseek_v2",
        route,
        "select",
        lambda s, k, b, g, kept: _select(s, k, torch.zeros(s.shape[-1]), g, kept),
    ),
    "groups left out": ("deepseek_v3", route, "select", lambda s, k, b, g, kept: _select(s, k, b, 1, 1)),
    "neighbours not rotated together": ("deepseek_v3", decoder, "_pairs_apart", lambda x: x),
    "scores by softmax": ("deepseek_v3", torch.Tensor, "sigmoid", lambda s: s.softmax(-1)),
    "mscale left out": ("deepseek_v3, yarn", decoder, "latent_factor", lambda scaling: 1.0),
    "mscale not of features with position": ("deepseek_v3, yarn", decoder, "attention_factor", lambda scaling: 1.0),
    "temperature left out": ("qwen3_moe, yarn", decoder, "attention_factor", lambda scaling: 1.0),
    "ramp left out": ("qwen3_moe, yarn", rope, "_kept_by_yarn", lambda size, theta, scaling: torch.zeros(size // 2)),
    "shared expert not gated": ("qwen2_moe", F, "sigmoid", torch.ones_like),
}
_weights, _select = route.weights, route.select


@pytest.mark.parametrize("bug", BUGS)
def test_parity_sees_planted_bug(
    bug: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    name, where, part, wrong = BUGS[bug]
    published(name, tmp_path)
    tokens_BL = tiny.tokens(3, 40)
    right = loaded(tmp_path)(tokens_BL)
    monkeypatch.setattr(where, part, wrong)
    rope.frequencies.cache_clear()
    request.addfinalizer(rope.frequencies.cache_clear)
    assert distance(loaded(tmp_path)(tokens_BL), right) > 100 * BOUND


@pytest.mark.parametrize(
    "name", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "deepseek_v3, yarn"]
)
def test_transformers_reads_what_is_written(name: str, tmp_path: Path) -> None:
    model = experts.decoder(name).eval()
    huggingface.export(model.options, ((n, t.detach()) for n, t in experts.canonical(model)), tmp_path)
    twin = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert distance(model(tiny.tokens(2, 24)), twin(tiny.tokens(2, 24)).logits) < BOUND
