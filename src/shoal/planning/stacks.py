"""Software that trains: what is known of each stack that decides how long its steps take.

These are facts of a stack, judged from what is published of it, never fitted. What is fitted for a class of stacks is
in constants.toml.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stack:
    """kernels: that a dense block's forward pass launches; its backward pass twice as many. flash: 0 where attention
    scores go through memory, 1 FlashAttention, 2 FlashAttention-2, 3 kernels written for the device (cuDNN's, Pallas).
    fused: bytes that element-wise operations move, against the count in `block`. gradient_bytes: of one gradient when
    it is reduced; kept_bytes: while kept; kept_bf16: in bf16, where that is another number.

    overlaps_data, overlaps_tensor, overlaps_messages: reduces gradients under backward, sums of a tensor group under
    products, a pipeline's messages under computing. shards: tensor groups share sequences where a table does not say.
    pads: the vocabulary, to a multiple of 128 for each tensor rank. interleaves: a pipeline's chunks, where a table
    does not say how many. reduces_whole: gradients of sharded optimizers by all-reduce.
    shares_context: ZeRO spreads over the context axis too.
    gathers_once: FSDP gathers a pipeline's stages once a step, and reduces gradients each micro-batch under ZeRO 2.
    adds_whole: it gathers them once and adds gradients up before it reduces them, once.
    operators: computing again selectively keeps attention and every second product of a block, and not all but
    attention.
    tiles: the loss never has all logits at once. constants: those of a class.
    """

    name: str
    kernels: float
    flash: int
    fused: float
    gradient_bytes: float
    kept_bytes: float
    constants: str
    overlaps_data: bool = False
    overlaps_tensor: bool = False
    overlaps_messages: bool = False
    shards: bool = False
    pads: bool = False
    interleaves: bool = False
    reduces_whole: bool = False
    shares_context: bool = False
    gathers_once: bool = False
    adds_whole: bool = False
    operators: bool = False
    tiles: bool = False
    kept_bf16: float | None = None


STACKS = {
    stack.name: stack
    for stack in (
        Stack("megatron-2021", 26, 0, 0.85, 4, 4, "megatron", pads=True, interleaves=True),
        # Its optimizer for bf16 adds gradients up in fp32, beside those of 16 bits.
        Stack("megatron-deepspeed", 26, 0, 0.85, 2, 2, "deepspeed", pads=True, reduces_whole=True, kept_bf16=6),
        Stack("megatron-unfused", 38, 0, 1.0, 2, 4, "unfused", pads=True),
        Stack(
            "megatron-core", 16, 3, 0.75, 4, 4, "core",
            overlaps_data=True, overlaps_tensor=True, overlaps_messages=True, shards=True, pads=True,
            shares_context=True,
        ),
        Stack("fsdp1", 26, 1, 1.4, 4, 4, "fsdp1", overlaps_data=True),
        # Of these no row was fitted: guesses from what their descriptions say.
        Stack(
            "fsdp2", 26, 2, 1.0, 4, 4, "fsdp1",
            overlaps_data=True, shares_context=True, adds_whole=True, operators=True, shards=True,
        ),
        Stack(
            "fsdp2-compiled", 12, 2, 0.65, 4, 4, "fsdp1",
            overlaps_data=True, shares_context=True, adds_whole=True, operators=True, shards=True,
        ),
        # Our own: kernels as counted on CPU (a test does), never timed on a GPU.
        Stack(
            "shoal", 32, 2, 1.0, 4, 4, "fsdp1",
            overlaps_data=True, shards=True, shares_context=True, gathers_once=True, tiles=True,
        ),
        Stack("jax", 12, 3, 0.6, 4, 4, "jax", overlaps_data=True),
    )
}  # fmt: skip

# The first whose words are all in a table's description.
_WORDS = (
    (("maxtext",), "jax"), (("pax",), "jax"), (("jax",), "jax"), (("xla",), "jax"),
    (("mosaicml",), "fsdp1"), (("fsdp1",), "fsdp1"), (("llm-foundry",), "fsdp1"),
    (("torchtitan", "compile"), "fsdp2-compiled"), (("fsdp2", "compile"), "fsdp2-compiled"),
    (("torchtitan",), "fsdp2"), (("fsdp2",), "fsdp2"), (("fsdp",), "fsdp1"),
    (("unfused",), "megatron-unfused"), (("megatron-deepspeed",), "megatron-deepspeed"),
    (("deepspeed",), "megatron-deepspeed"), (("nemo",), "megatron-core"), (("transformer engine",), "megatron-core"),
    (("megatron-core",), "megatron-core"), (("megatron core",), "megatron-core"),
    (("megatron-bridge",), "megatron-core"), (("mcore",), "megatron-core"), (("megatron",), "megatron-2021"),
)  # fmt: skip


def of(software: str, *, sharded: bool, flash_age: bool) -> tuple[Stack, bool]:
    """(the stack that a published table describes so, whether its description is known).

    sharded, flash_age: for one that is unknown: it trains with FSDP, and on devices of which all came with
    FlashAttention's second version or later.
    """
    said = software.lower()
    for words, name in _WORDS:
        if all(word in said for word in words):
            return STACKS[name], True
    if sharded:
        return STACKS["fsdp2" if flash_age else "fsdp1"], False
    return STACKS["megatron-core" if flash_age else "megatron-2021"], False
