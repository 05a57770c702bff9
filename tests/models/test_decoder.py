"""The decoder against transformers' Llama: logits and all gradients, within 1e-5 in float32 and 1e-10 in
float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.models import build, decoder
from shoal.ops import rope
from shoal.ops.attention import document_attend
from shoal.ops.loss import chunked_cross_entropy
from tests.models import experts, tiny

BOUND = {torch.float32: 1e-5, torch.float64: 1e-10}


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value where that is above 1."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item()


def loss(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    return F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), tokens_BL[:, 1:].flatten())


def compare(model: decoder.Decoder, dtype: torch.dtype) -> tuple[float, float]:
    """Distance of logits, and the largest of all gradients, from transformers'."""
    tokens_BL = tiny.tokens(3, 40)
    twin = tiny.transformers_twin(model)
    ours, theirs = model(tokens_BL), twin(tokens_BL).logits
    loss(ours, tokens_BL).backward()
    loss(theirs, tokens_BL).backward()
    gradients = {name: p.grad for name, p in twin.named_parameters()}
    found = dict(experts.canonical(model, gradients=True))
    assert gradients.keys() == found.keys()
    worst = 0.0
    for name, gradient in found.items():
        assert gradients[name].abs().max() > 1e-6, f"{name} has no gradient to compare"
        worst = max(worst, distance(gradient, gradients[name]))
    return distance(ours, theirs), worst


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", tiny.CASES)
def test_equals_transformers(case: str, dtype: torch.dtype) -> None:
    logits, gradients = compare(tiny.decoder(tiny.CASES[case], dtype), dtype)
    assert logits < BOUND[dtype]
    assert gradients < BOUND[dtype]


def _swap_pairs(x_BLHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope.rotate(x_BLHD, cos, -sin)


def _repeat_keys_in_turn(q_BLHD: Tensor, k_BLKD: Tensor, v_BLKD: Tensor) -> Tensor:
    times = q_BLHD.shape[2] // k_BLKD.shape[2]
    q, k, v = q_BLHD, k_BLKD.repeat(1, 1, times, 1), v_BLKD.repeat(1, 1, times, 1)
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True).transpose(1, 2)


BUGS: dict[str, tuple[str, Callable]] = {
    "rotates the other way": ("rotate", _swap_pairs),
    "llama3 ramp left out": (
        "frequencies",
        lambda size, theta, scaling, where: rope.frequencies(size, theta, "", where),
    ),
    "norm without eps": (
        "rms_norm",
        lambda x, w, eps, dtype: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    ),
    "keys shared by the wrong heads": ("causal_attend", lambda: lambda layer: _repeat_keys_in_turn),
}


@pytest.mark.parametrize("bug", BUGS)
def test_sees_planted_bug(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, *BUGS[bug])
    logits, gradients = compare(tiny.decoder(tiny.CASES["llama3"], torch.float64), torch.float64)
    assert logits > BOUND[torch.float64]
    assert gradients > BOUND[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_packed_documents_equal_separate_rows(dtype: torch.dtype) -> None:
    model = tiny.decoder(tiny.CASES["llama"], dtype)
    lengths = [5, 17, 1, 9]
    documents = [tiny.tokens(1, n, seed=n) for n in lengths]
    document_BL = torch.cat([torch.full((1, n), i) for i, n in enumerate(lengths)], 1)
    position_BL = torch.cat([torch.arange(n)[None] for n in lengths], 1)
    packed = model(torch.cat(documents, 1), position_BL, document_attend(document_BL))
    separate = torch.cat([model(document) for document in documents], 1)
    assert distance(packed, separate) < BOUND[dtype]
    # Planted bugs: the mask forgotten; positions that do not count by one. (That they do not restart would
    # not show: rotary attention depends on differences only.)
    assert distance(model(torch.cat(documents, 1), position_BL), separate) > 1e-2
    assert distance(model(torch.cat(documents, 1), 2 * position_BL, document_attend(document_BL)), separate) > 1e-2


def test_head_replaces_logits() -> None:
    model = tiny.decoder(tiny.CASES["tied"], torch.float64)
    tokens_BL, labels_BL, weight_BL = tiny.tokens(2, 9), tiny.tokens(2, 9, seed=1), torch.ones(2, 9)
    ours = model(tokens_BL, head=lambda h, w: chunked_cross_entropy(h, w, labels_BL, weight_BL, 4))
    plain = F.cross_entropy(model(tokens_BL).flatten(0, 1), labels_BL.flatten(), reduction="sum")
    assert abs(ours.item() - plain.item()) < 1e-10


def test_tokens_go_by_hugging_faces_name() -> None:
    model, tokens_BL = tiny.decoder(tiny.BASE), tiny.tokens(2, 9)
    assert torch.equal(model(input_ids=tokens_BL), model(tokens_BL))


def test_meta_model_takes_no_memory_and_needs_no_buffer() -> None:
    with torch.device("meta"):
        model = build(tiny.BASE)
    assert all(p.is_meta for p in model.parameters())
    assert list(model.buffers()) == []
    model.to_empty(device="cpu")
    model.load_state_dict(tiny.decoder(tiny.BASE).state_dict())
    assert torch.equal(model(tiny.tokens(1, 8)), tiny.decoder(tiny.BASE)(tiny.tokens(1, 8)))


def test_build_leaves_the_random_stream_alone() -> None:
    before = torch.get_rng_state()
    build(tiny.BASE)
    assert torch.equal(before, torch.get_rng_state())


def test_autocast_equals_weights_that_arrive_in_bf16() -> None:
    """Mixed-precision FSDP hands over bf16 weights inside autocast; plain autocast casts float32 ones
    itself."""
    model, tokens_BL = tiny.decoder(tiny.CASES["biases"]), tiny.tokens(2, 16)
    with torch.autocast("cpu", torch.bfloat16):
        cast = model(tokens_BL)
        arrived = tiny.decoder(tiny.CASES["biases"]).bfloat16()(tokens_BL)
    assert cast.dtype == torch.bfloat16
    assert torch.equal(cast, arrived)
    assert distance(cast.float(), model(tokens_BL)) < 0.1


def test_autocast_keeps_the_residual_stream_in_float32() -> None:
    model, seen = tiny.decoder(tiny.BASE), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(tiny.tokens(1, 4))
    assert seen == [torch.float32] * 3


def test_bf16_model_stays_near_transformers() -> None:
    """Without autocast everything is bf16, where the two round at different places: 2 % of the largest
    logit."""
    model = tiny.decoder(tiny.BASE).bfloat16()
    ours, theirs = model(tiny.tokens(2, 24)), tiny.transformers_twin(model)(tiny.tokens(2, 24)).logits
    assert ours.dtype == torch.bfloat16
    assert distance(ours.float(), theirs.float()) < 0.02


def test_gradient_of_input_only_where_asked() -> None:
    model = tiny.decoder(tiny.BASE)
    with torch.no_grad():
        assert not model(tiny.tokens(1, 3)).requires_grad
