"""Which blocks of the model each pipeline stage has: as given, or so that the most expensive stage costs least, as
estimated here or as measured (`training.measure.pieces`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod

from shoal.job.layout import Layout
from shoal.job.model import ModelOptions
from shoal.models.spec import parameters

EMBEDDING, HEAD = "embedding", "head"
"""Pieces of a model beside its blocks; the head with the norm before it and the loss."""


def layers_of_stages(options: ModelOptions, layout: Layout, sequence_length: int) -> list[range]:
    """The blocks of every stage, in order. Each stage has at least one block."""
    sizes = layout.blocks_per_stage or balance(*layer_costs(options, sequence_length), layout.stage_count)
    assert sum(sizes) == options.num_hidden_layers, f"{sizes} are not the {options.num_hidden_layers} blocks"
    return [range(a, b) for a, b in pairwise((0, *accumulate(sizes)))]


def layer_costs(options: ModelOptions, sequence_length: int) -> tuple[list[float], float]:
    """(cost of each block, cost of the output layer) in operations of a token's forward, as estimated.

    2 a weight that is multiplied, of routed experts those of num_experts_per_tok, and for the products of causal
    attention heads · (head_size + value_size) · length. Looking up an embedding multiplies nothing.
    """
    attention = options.num_attention_heads * (options.head_size + options.value_size) * sequence_length
    costs = [float(attention)] * options.num_hidden_layers
    for name, spec in parameters(options).items():
        if name.startswith("model.layers.") and len(spec.shape) == 2:
            costs[int(name.split(".")[2])] += 2.0 * prod(spec.shape) * spec.share
    return costs, 2.0 * options.vocab_size * options.hidden_size


def kind(options: ModelOptions, layer: int) -> str:
    """What this block is called where blocks of a kind cost the same: a model has one kind, or two."""
    one = len({options.routes(layer) for layer in range(options.num_hidden_layers)}) == 1
    return "block" if one else "routed block" if options.routes(layer) else "dense block"


def measured_costs(options: ModelOptions, seconds: Mapping[str, float]) -> tuple[list[float], float]:
    """(cost of each block, cost of the output layer), as `balance` takes them.

    seconds: of embedding, a block of each `kind`, head. The embedding counts as the first block's, which is always in
    the same stage.
    """
    costs = [seconds[kind(options, layer)] for layer in range(options.num_hidden_layers)]
    return [costs[0] + seconds[EMBEDDING], *costs[1:]], seconds[HEAD]


def balance(costs: Sequence[float], head: float, stages: int) -> list[int]:
    """Blocks of each of `stages` stages, in order, at least one, the last with `head` on top: the dearest stage is as
    cheap as can be, and of those splits the one that has the rest most even (least sum of squares)."""
    assert 1 <= stages <= len(costs), f"{len(costs)} blocks for {stages} stages"
    total = [0.0, *accumulate(costs)]

    def best(worth: Callable[[float, float], float]) -> tuple[float, list[int]]:
        """The split for which `worth(of the stages before, cost of the next)` is least in the end."""
        found: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
        for stage in range(stages):
            extra = head if stage == stages - 1 else 0.0
            ends = range(stage + 1, len(costs) - (stages - 1 - stage) + 1)
            found = {
                end: min(
                    (worth(before, total[end] - total[start] + extra), [*sizes, end - start])
                    for start, (before, sizes) in found.items()
                    if start < end
                )
                for end in ends
            }
        return found[len(costs)]

    # One after the other: a part of a split that is worse by itself may be part of the best one.
    dearest, _ = best(max)
    limit = dearest * (1 + 1e-12)
    return best(lambda before, cost: before + cost * cost if cost <= limit else math.inf)[1]
