"""Memory of a rank on a CPU: of a block against what autograd saves, of parts by hand."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.errors import LayoutError
from shoal.job.model import ModelOptions
from shoal.models.decoder import Block
from shoal.models.spec import count
from shoal.ops.attention import causal_attend
from shoal.ops.rope import frequencies, rotation
from shoal.planning import kept
from tests.planning.test_local import JOB, in_layout


def saved(options: ModelOptions, tokens: int, narrow: bool) -> int:
    """Bytes that autograd saves of a block, each storage once, but for weights and positions."""
    block = Block(options, 0)
    x_BLD = torch.randn(1, tokens, options.hidden_size, requires_grad=True)
    cos, sin = rotation(
        torch.arange(tokens)[None], frequencies(options.head_size, 1e4, "", x_BLD.device), torch.float32
    )
    beside = {t.untyped_storage().data_ptr() for t in (*block.parameters(), cos, sin)}
    cast = {prod(p.shape) for p in block.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        # A weight that autocast has cast lies in a storage of its own, with as many numbers, in bf16.
        is_weight = tensor.dtype == torch.bfloat16 and tensor.ndim < 3 and tensor.numel() in cast
        if place not in beside and not is_weight:
            found[place] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=narrow),
    ):
        block(x_BLD, cos, sin, causal_attend()(0))
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@settings(max_examples=12, deadline=None)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([16, 24]), st.integers(1, 3), st.booleans())
def test_a_block_keeps_what_autograd_saves(heads, size, feed, narrow):
    """But for norms' one number of a token, and what rounds sizes up."""
    options = ModelOptions(
        vocab_size=64, hidden_size=48, intermediate_size=40 * feed, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=heads, head_dim=size,
    )  # fmt: skip
    # No multiple of anything: some activations would have as many numbers as a weight.
    tokens = 67
    given_, rest = kept.of_block(options, narrow)
    assert (given_ + rest) * tokens == pytest.approx(saved(options, tokens, narrow), rel=0.01)


def of(layout, resident=2.0**28, **train):
    job = in_layout(layout)
    return kept.predict(replace(job, train=replace(job.train, **train)), resident)


def test_what_each_part_is():
    whole, numbers = of("replicas=1"), count(JOB.model)
    assert tuple(sorted(whole)) == tuple(sorted(kept.PARTS))
    assert whole["process"] == 2.0**28 + kept.LIBRARIES
    assert whole["weights"] == pytest.approx(4 * numbers, rel=0.001)
    assert whole["optimizer"] == 2 * whole["weights"] == 2 * whole["gradients"]
    assert whole["buckets"] == whole["gathered"] == 0
    two = of("replicas=2")
    assert two["buckets"] == whole["weights"]
    assert two["activations"] == pytest.approx(whole["activations"] / 2)
    shared = of("fsdp=2,zero=3")
    assert shared["weights"] == shared["gradients"] == shared["optimizer"] / 2 == whole["weights"] / 2
    assert shared["gathered"] > 0
    assert of("fsdp=2,zero=1")["weights"] == of("fsdp=2,zero=2")["weights"] == whole["weights"]
    assert of("fsdp=2,zero=2")["gradients"] == whole["weights"] / 2
    assert of("tensor=2")["weights"] == pytest.approx(whole["weights"] / 2)
    assert of("pipeline=2,micro_batch=2")["weights"] < whole["weights"]


def test_less_is_kept_of_smaller_micro_batches_and_of_blocks_that_are_computed_again():
    whole = of("replicas=1")["activations"]
    assert of("replicas=1,micro_batch=2")["activations"] == pytest.approx(whole / 4, rel=0.01)
    assert of("replicas=1,recompute=block")["activations"] < whole
    narrow = of("replicas=1", precision="bf16")
    assert 0.5 * whole < narrow["activations"] - narrow["weights"] / 2 < 0.8 * whole


def test_a_first_rank_keeps_more_micro_batches_than_the_last():
    """1F1B: two on the first of two ranks; GPipe all."""
    layout = "pipeline=2,micro_batch=1"
    first, every = of(layout)["activations"], of(f"{layout},schedule=gpipe")["activations"]
    assert every > 2 * first > 0


def test_what_is_not_counted():
    job = in_layout("replicas=1")
    for changed, words in (
        (replace(job, train=replace(job.train, compile="on")), "train.compile=on"),
        (replace(job, sync=replace(job.sync, codec="int8")), "sync.codec=int8"),
        (replace(job, optim=replace(job.optim, name="sgd")), "optim.name=sgd"),
    ):
        with pytest.raises(LayoutError, match="memory is predicted without") as caught:
            kept.predict(changed, 0.0)
        assert words in str(caught.value)
