"""Which blocks of the model each pipeline stage has: as given, or so that the most expensive stage costs least."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import prod

from shoal.job.layout import Layout
from shoal.job.model import ModelOptions
from shoal.models.spec import parameters


def layers_of_stages(options: ModelOptions, layout: Layout, sequence_length: int) -> list[range]:
    """The blocks of every stage, in order. Each stage has at least one block."""
    sizes = layout.blocks_per_stage or balance(*layer_costs(options, sequence_length), layout.stage_count)
    assert sum(sizes) == options.num_hidden_layers, f"{sizes} are not the {options.num_hidden_layers} blocks"
    return [range(a, b) for a, b in pairwise((0, *accumulate(sizes)))]


def layer_costs(options: ModelOptions, sequence_length: int) -> tuple[list[float], float]:
    """(cost of each block, cost of the output layer) in operations of a token's forward, as estimated.

    2 a weight that is multiplied, and 2 · heads · head_size · length for the products of causal attention. Looking up
    an embedding multiplies nothing.
    """
    costs = [2.0 * options.num_attention_heads * options.head_size * sequence_length] * options.num_hidden_layers
    for name, spec in parameters(options).items():
        if name.startswith("model.layers.") and len(spec.shape) == 2:
            costs[int(name.split(".")[2])] += 2.0 * prod(spec.shape)
    return costs, 2.0 * options.vocab_size * options.hidden_size


def balance(costs: Sequence[float], head: float, stages: int) -> list[int]:
    """Blocks of each of `stages` stages, in order, at least one, the last with `head` on top: the dearest stage is as
    cheap as can be, and of those splits the one that has the rest most even (least sum of squares)."""
    assert 1 <= stages <= len(costs), f"{len(costs)} blocks for {stages} stages"
    total = [0.0, *accumulate(costs)]
    # best[n]: (dearest stage, sum of squares, sizes) of the first n blocks in as many stages as there were rounds.
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for stage in range(stages):
        extra = head if stage == stages - 1 else 0.0
        following: dict[int, tuple[float, float, list[int]]] = {}
        for end in range(stage + 1, len(costs) - (stages - 1 - stage) + 1):
            for start, (dearest, squares, sizes) in best.items():
                if start < end:
                    cost = total[end] - total[start] + extra
                    found = (max(dearest, cost), squares + cost * cost, [*sizes, end - start])
                    if end not in following or found < following[end]:
                        following[end] = found
        best = following
    return best[len(costs)][2]
