"""Local steps: layouts against one process that has every replica as a model of its own, and what must be equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.equivalence import cases
from tests.sync import local_cases

STEPS = 9
DILOCO = {"every": 3, "outer_lr": 0.7, "outer_momentum": 0.9}
STREAMING = {"every": 4, "fragments": 2, "delay": 1, "mix": 0.25, "outer_lr": 0.5, "outer_momentum": 0.6}
AVERAGING = {"every": 2, "outer_lr": 1.0, "outer_momentum": 0.0, "together": 3}

CASES = [
    ("replicas=3,micro_batch=2", DILOCO, "adamw", "even"),
    ("replicas=3,micro_batch=2", STREAMING, "sgd", "even"),
    ("replicas=3,micro_batch=4", AVERAGING, "adamw", "even"),
    # Fragments all on their way at once, and one that never left before its first turn.
    ("replicas=2,micro_batch=3", {**STREAMING, "fragments": 4, "delay": 3}, "sgd", "even"),
    ("replicas=1,micro_batch=6", DILOCO, "adamw", "even"),
    ("replicas=2,fsdp=2,micro_batch=1", STREAMING, "adamw", "even"),
    ("replicas=2,tensor=2,micro_batch=2", DILOCO, "sgd", "even"),
    ("replicas=2,pipeline=2,micro_batch=2", STREAMING, "adamw", "even"),
    ("replicas=2,context=2,micro_batch=2", AVERAGING, "sgd", "even"),
    ("replicas=2,fsdp=2,expert=2,micro_batch=1", DILOCO, "sgd", "deepseek"),
    ("replicas=3,micro_batch=2", DILOCO, "muon", "even"),
    ("replicas=2,fsdp=2,micro_batch=1", STREAMING, "muon", "even"),
]


def near(told: list[tuple[str, list[int], Any]], expected: dict[str, Any], what: str) -> None:
    assert {name for name, _, _ in told} <= expected.keys()
    assert told
    for name, offsets, values in told:
        piece, like = torch.tensor(values, dtype=torch.float64), expected[name]
        if piece.numel():
            assert cases.apart(piece, like[cases.place(offsets, piece)], like) < 1e-8, f"{what}: {name}"


@pytest.mark.parametrize(("layout", "sync", "optimizer", "model"), CASES)
def test_training_is_that_of_one_process_with_a_model_for_each_replica(ranks, layout, sync, optimizer, model):
    options = {"optimizer": optimizer, "tied": False, "model": model}
    replicas = int(layout.split(",")[0].partition("=")[2])
    world = cases.Layout.parse(layout).world
    results = ranks.run("tests.sync.local_cases:train", world, layout=layout, steps=STEPS, sync=sync, **options)
    expected = local_cases.reference(replicas, STEPS, sync, **options)
    for result in results:
        for step in range(STEPS):
            near(result["common"][step], expected["common"][step], f"common after step {step + 1}")
        near(result["own"][-1], expected["own"][result["replica"]], "own")
        losses = expected["losses"][result["replica"]][sync.get("together", 0) :]
        for got, right in zip(result["losses"][sync.get("together", 0) :], losses, strict=True):
            assert abs(got - right) < 1e-8 * abs(right)
    mean = [sum(of_step) / replicas for of_step in zip(*expected["losses"], strict=True)]
    assert mean[-1] < 0.95 * mean[0]


UNEVEN = [
    ("replicas=3,replica_share=1+3+2,micro_batch=2", DILOCO, "adamw"),
    ("replicas=3,micro_batch=2", {**DILOCO, "pace": "2+1+2"}, "adamw"),
    ("replicas=2,replica_share=2+1,micro_batch=2", {**STREAMING, "pace": "3+5"}, "sgd"),
    ("replicas=2,micro_batch=2", {**AVERAGING, "pace": "1+2"}, "adamw"),
    ("replicas=2,replica_share=2+1,fsdp=2,micro_batch=2", {**DILOCO, "pace": "1+2"}, "sgd"),
    ("replicas=2,replica_share=1+2,pipeline=2,micro_batch=2", {**STREAMING, "pace": "2+1"}, "adamw"),
]


@pytest.mark.parametrize(("layout", "sync", "optimizer"), UNEVEN)
def test_uneven_replicas_train_as_in_one_process(ranks, layout, sync, optimizer):
    """With unequal parts of the batch, with unequally many steps, and both."""
    options, where = {"optimizer": optimizer, "tied": False, "model": "even"}, cases.Layout.parse(layout)
    results = ranks.run("tests.sync.local_cases:train", where.world, layout=layout, steps=STEPS, sync=sync, **options)
    expected = local_cases.reference(where.replicas, STEPS, sync, share=where.shares, **options)
    for result in results:
        for step in range(STEPS):
            near(result["common"][step], expected["common"][step], f"common after step {step + 1}")
        near(result["own"][-1], expected["own"][result["replica"]], "own")
        apart = slice(sync.get("together", 0), None)
        for got, right in zip(result["losses"][apart], expected["losses"][result["replica"]][apart], strict=True):
            assert abs(got - right) < 1e-8 * abs(right)


def test_how_uneven_replicas_are_weighed_would_be_seen():
    options = {"optimizer": "sgd", "tied": False, "model": "even"}
    for one, other in [({"share": (2, 1)}, {}), ({"share": (2, 1)}, {"pace": "2+1"}), ({"pace": "2+1"}, {})]:
        both = (local_cases.reference(2, 5, DILOCO | how, **options)["common"][-1] for how in (one, other))
        first, second = both
        assert max(cases.apart(first[name], second[name], first[name]) for name in first) > 1e-5


@pytest.mark.parametrize("sync", [DILOCO, {**STREAMING, "feedback": False}, {**STREAMING, "delay": 3}])
def test_rounding_what_is_sent_is_that_of_one_process_too(ranks, sync):
    """With what is lost added to the next exchange, or not."""
    options = {"optimizer": "sgd", "tied": False, "model": "even"}
    layout, given = "replicas=3,micro_batch=2", sync | {"codec": "bf16"}
    results = ranks.run("tests.sync.local_cases:train", 3, layout=layout, steps=STEPS, sync=given, **options)
    expected = local_cases.reference(3, STEPS, sync, codec="bfloat16", **options)
    for result in results:
        for step in range(STEPS):
            near(result["common"][step], expected["common"][step], f"common after step {step + 1}")
    other = sync | {"feedback": not sync.get("feedback", True)}
    without = local_cases.reference(3, STEPS, other, codec="bfloat16", **options)["common"][-1]
    apart = max(cases.apart(tensor, without[name], tensor) for name, tensor in expected["common"][-1].items())
    assert apart > 1e-6, "feedback changes nothing that could be seen"


@pytest.mark.parametrize("change", [{"outer_momentum": 0.8}, {"outer_lr": 0.71}, {"mix": 0.01}, {"delay": 1}])
def test_another_algorithm_would_be_seen(change):
    """What the tests above allow is far less than what any option does."""
    options = {"optimizer": "sgd", "tied": False, "model": "even"}
    one, other = (local_cases.reference(2, 5, sync, **options)["common"][-1] for sync in (DILOCO, DILOCO | change))
    assert max(cases.apart(one[name], other[name], one[name]) for name in one) > 1e-5


def test_common_weights_are_equal_to_the_last_bit_whatever_travels_together(ranks):
    """In float32 on three replicas: a sum that went by the size of buckets would differ in some bits."""
    sync = {"every": 2, "fragments": 2, "outer_lr": 0.7, "outer_momentum": 0.9}
    first = None
    for bucket in (0.001, 0.004, 25.0):
        told = ranks.run("tests.sync.local_cases:agreement", 3, bucket_mib=bucket, steps=6, sync=sync)
        first = first or told[0]
        for of_rank in told:
            for step, (bits, same) in enumerate(zip(of_rank, first, strict=True), 1):
                assert bits["common"] == same["common"], f"step {step}, buckets of {bucket} MiB"
    assert first is not None
    # Fragment 0 arrives after odd steps (blocks 0 and 2), fragment 1 after even ones: a replica has just taken it over.
    for step, bits in enumerate(first, 1):
        arrived = {name for name in bits["own"] if local_cases._fragment(name, 2) == (step + 1) % 2}
        assert all(bits["own"][name] == bits["common"][name] for name in arrived)
        if step < 6:
            assert any(bits["own"][name] != bits["common"][name] for name in bits["own"].keys() - arrived)


def test_nothing_is_sent_between_outer_steps(ranks):
    """Of n numbers in float32, three replicas send 2 · 2/3 n times 4 bytes each in an outer step; half with bf16."""
    sync = {"every": 3, "outer_lr": 0.7, "outer_momentum": 0.9}
    for codec, size in (("none", 4), ("bf16", 2)):
        for *steps, (numbers, _) in ranks.run(
            "tests.sync.local_cases:bytes_of_steps", 3, sync=sync, codec=codec, steps=7
        ):
            for step, (sent, received) in enumerate(steps[:6], 1):
                least = 2 * 2 / 3 * size * numbers if step % 3 == 0 else 0
                assert least <= sent <= 1.05 * least + 3000, (codec, step)
                assert least <= received <= 1.05 * least + 3000, (codec, step)


@pytest.mark.parametrize("name", ["local", "gossip"])
@pytest.mark.parametrize(
    "layout", ["replicas=2,fsdp=2,micro_batch=1", "replicas=2,tensor=2,micro_batch=2", "replicas=3"]
)
def test_every_number_of_the_state_is_saved_once(ranks, name, layout):
    """Also biases that no gradient reaches, of which every rank has all."""
    world = cases.Layout.parse(layout).world
    told = ranks.run(
        "tests.sync.local_cases:saved_by", world, layout=layout, sync={"name": name, "every": 2}, model="deepseek"
    )
    names = set().union(*told)
    assert any("weight@1." in n and n.endswith("e_score_correction_bias") for n in names)
    for n in names:
        assert sum(of_rank[n][1] for of_rank in told if n in of_rank) == next(r[n][0] for r in told if n in r), n
