"""Experts, latent attention and ZeRO in the cost and memory models, against the counts of training's own models."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.job.layout import Layout
from shoal.job.model import ModelOptions
from shoal.models import decoder, spec
from shoal.planning import collectives, constants, memory, published, stacks, step, work
from shoal.planning.constants import Rates
from tests.planning.test_memory import ONE

DEEPSEEK = ModelOptions(
    family="deepseek_v3", vocab_size=512, hidden_size=256, intermediate_size=640, num_hidden_layers=6,
    num_attention_heads=8, num_key_value_heads=8, num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128,
    shared_expert_intermediate_size=128, first_k_dense_replace=2, q_lora_rank=96, kv_lora_rank=64,
    qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=24, tie_word_embeddings=False,
)  # fmt: skip
MODEL = {
    "layers": 6, "hidden": 256, "feed": 640, "heads": 8, "key_heads": 8, "head_size": 48, "vocab": 512, "gated": 1,
    "tied": 0, "experts": 16, "chosen": 4, "expert_feed": 128, "shared_feed": 128, "dense_layers": 2, "latent": 1,
    "latent_q": 96, "latent_kv": 64, "rope_size": 16, "value_size": 24,
    **{name: float(getattr(stacks.STACKS["shoal"], name)) for name in work.STACK},
}  # fmt: skip


def of(**changed):
    return work.of_rows([{**ONE, **MODEL, **changed}], ["a100-80"], ["fsdp1"])


def laid(text, **changed):
    """As a `Layout` says."""
    one = Layout.parse(text)
    names = ("tensor", "pipeline", "context", "fsdp", "zero", "expert")
    axes = {name: getattr(one, name) for name in names}
    return one, of(**axes, data=one.readers, devices=one.world, **changed)


@pytest.mark.parametrize("compressed", [96, 0])
def test_weights_and_flops_are_those_of_trainings_model(compressed):
    options = replace(DEEPSEEK, q_lora_rank=compressed)
    one = of(latent_q=compressed)
    matrices = sum(prod(s.shape) for s in spec.parameters(options).values() if len(s.shape) == 2)
    owned = memory.owned(one, np.zeros(1)) + memory.owned_experts(one, np.zeros(1))
    assert owned == pytest.approx([matrices])
    tokens = one.global_batch * one.sequence
    assert one.model_flops == pytest.approx(spec.flops_per_token(options, 2048) * tokens)


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize("axes", ["fsdp=4,expert=2", "fsdp=2,tensor=2,expert=4", "fsdp=2,context=2,tensor=2,expert=4",
                                  "pipeline=3,fsdp=4,expert=4", "pipeline=2,context=2,fsdp=2"])  # fmt: skip
def test_ranks_together_have_the_models_optimizer_and_no_more(axes, zero):
    layout, one = laid(f"{axes},zero={zero}")
    apart = layout.ranks_per_replica // layout.pipeline
    found = [memory.stage(one, np.array([float(rank)])) for rank in range(layout.pipeline)]
    every = sum(memory.owned(one, np.array([float(r)])) * layout.tensor for r in range(layout.pipeline))
    every = every + sum(memory.owned_experts(one, np.array([float(r)])) * layout.expert for r in range(layout.pipeline))
    assert sum(stage.optimizer for stage in found) * apart == pytest.approx(12 * every)
    summed = sum(stage.weights for stage in found) * apart
    # A pipeline's stages are gathered once a step.
    assert (summed > 2 * every * 1.01) == (zero < 3 or layout.pipeline > 1)
    assert one.sharers == layout.sharers
    assert one.expert_sharers == layout.rest


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_time_and_memory_agree_on_who_shares(zero):
    """The update's traffic is what a rank keeps of the optimizer's 12 bytes a weight, at every stage."""
    for text in ("fsdp=4", "replicas=2,fsdp=4", "fsdp=2,context=2", "context=2,fsdp=2,tensor=2,expert=4"):
        _, one = laid(f"{text},zero={zero}")
        rates = Rates.of(constants.load(), one)
        kept = memory.stage(one, np.zeros(1))
        # Its tables are tied in the time of an update, which has one of them.
        rest = one.vocab * one.hidden / one.tensor
        whole = (kept.optimizer / 12 - rest / one.sharers) * 28
        whole = whole + kept.weights - rest * 2 / (one.sharers if zero == 3 else 1)
        update = step.cost(one, constants.load()).parts["optimizer"] - 100 * rates.host
        assert update * rates.memory == pytest.approx(whole)


def test_one_expert_for_all_is_the_dense_block_but_for_routing():
    large = {"hidden": 4096, "feed": 16384, "heads": 32, "key_heads": 32, "head_size": 128, "value_size": 128}
    large |= {"latent": 0, "latent_q": 0, "latent_kv": 0, "rope_size": 0, "shared_feed": 0}
    dense = of(**large, expert_feed=0, chosen=0, experts=0, dense_layers=6)
    routed = of(**large, experts=1, chosen=1, expert_feed=16384, dense_layers=0)
    before, after = (step.cost(one, constants.load()) for one in (dense, routed))
    assert (before.seconds < after.seconds).all()
    assert (after.seconds < 1.2 * before.seconds).all()
    assert routed.model_flops / dense.model_flops - 1 == pytest.approx(0, abs=2e-3)
    kept = [float(memory.cost(one).optimizer[0]) for one in (dense, routed)]
    assert kept[1] - kept[0] == pytest.approx(12 * 6 * 4096)


def test_more_chosen_experts_cost_more_and_more_ranks_hold_fewer():
    def seconds(**changed):
        return float(step.cost(laid("fsdp=8,expert=8", **changed)[1], constants.load()).seconds[0])

    assert seconds(chosen=2) < seconds(chosen=4) < seconds(chosen=8)
    # Of which the group lies in a node, or not.
    assert seconds(per_node=8) < seconds(per_node=2)
    held = [memory.owned_experts(laid(f"fsdp=8,expert={n}")[1], np.zeros(1)) for n in (1, 2, 8)]
    assert held[0] == 2 * held[1] == 8 * held[2]


@pytest.mark.parametrize("text", ["fsdp=4,zero=3", "fsdp=4,expert=4,zero=1", "pipeline=2,fsdp=2,zero=3"])
def test_parts_add_up_and_none_is_negative(text):
    found = step.cost(laid(text)[1], constants.load())
    assert sum(found.parts.values()) == pytest.approx(found.seconds)
    assert all((part >= 0).all() for part in found.parts.values())


def test_leading_dense_blocks_are_where_the_pipeline_begins():
    one = of(pipeline=3, dense_layers=3)
    assert [float(memory.dense_layers(one, np.array([r]))[0]) for r in (0.0, 1.0, 2.0)] == [2, 1, 0]


def test_an_exchange_over_two_nodes_sends_half_by_each_ranks_own_card():
    one = of()
    rates = Rates.of(constants.load(), one)
    sent = collectives.all_to_all(rates, np.array([16e9]), np.array([16.0]), np.array([8.0]))
    assert sent == pytest.approx(8e9 / rates.nic + constants.CALL + 2 * constants.HOP)
    assert collectives.all_to_all(rates, np.array([1e9]), np.array([1.0]), np.array([8.0])) == 0


def test_schedules_that_split_backward_wait_less():
    one = of(pipeline=3, chunks=2)
    waited = {
        name: float(step.cost(one, constants.load(), name).parts["bubble"][0])
        for name in ("interleaved", "interleaved_zero_bubble")
    }
    assert 0 < waited["interleaved_zero_bubble"] < 0.5 * waited["interleaved"]


def test_shoals_kernels_are_those_that_its_block_calls():
    """On CPU, without views: of two blocks more than of one. `kernels` leaves out the two of a gate."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += not func.is_view and "view" not in func.name()
            return func(*args, **(kwargs or {}))

    def calls(layers):
        model = decoder.create(ModelOptions(vocab_size=64, hidden_size=32, num_hidden_layers=layers))
        model(torch.zeros(1, 8, dtype=torch.long))
        with Count() as count:
            model(torch.zeros(1, 8, dtype=torch.long))
        return count.calls

    told = stacks.STACKS["shoal"].kernels + 2
    assert told == pytest.approx(calls(2) - calls(1), rel=0.2)


def test_published_rows_have_the_predictions_that_they_had_before_there_were_experts():
    """Sums over all rows, of the models as they were without the columns of this file. A refit changes the first."""
    rows = published.read(published.FIT)
    assert step.cost(rows.work, constants.load()).seconds.sum() == pytest.approx(44892.684048349736, rel=1e-12)
    assert memory.cost(rows.filled.work).allocated.sum() == pytest.approx(3242099515392.0, rel=1e-12)
    assert rows.work.model_flops.sum() == pytest.approx(8.2726302002193e20, rel=1e-12)
