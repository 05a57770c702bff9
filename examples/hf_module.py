"""A causal language model of Hugging Face's, as `transformers` makes it, in any layout.

    pip install transformers
    python examples/hf_module.py
    torchrun --nproc-per-node 2 examples/hf_module.py --layout tensor=2
    torchrun --nproc-per-node 2 examples/hf_module.py --layout pipeline=2

FSDP gathers the blocks that the module names, tensor parallelism follows its own plan (`base_model_tp_plan`), and a
pipeline cuts its graph. The output layer is the embedding: where they are in two stages, their gradients are added up.
(For the families that shoal knows, `shoal train` is faster.)
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import shoal

VOCAB, LENGTH, MICRO_BATCH = 64, 24, 4


def model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(step: int, samples: int) -> tuple[Tensor, Tensor]:
    """Tokens and the ones that follow, in sequences of constant stride: the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    start, stride = (torch.randint(1, n, (samples, 1), generator=generator) for n in (VOCAB, 5))
    tokens = (start + stride * torch.arange(LENGTH + 1)) % VOCAB
    return tokens[:, :-1], tokens[:, 1:]


def loss(output: Any, following: Tensor) -> tuple[Tensor, float]:
    """Summed over the tokens, and how many these are."""
    return F.cross_entropy(output.logits.flatten(0, 1), following.flatten(), reduction="sum"), following.numel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layout", default="replicas=1")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    tokens, _ = batch(0, MICRO_BATCH)
    trained = shoal.parallelize(model(), args.layout, example=tokens, loss=loss, lr=5e-3, clip=1.0)
    for step in range(args.steps):
        done = trained.step(trained.share(batch(step, 16)))
        if trained.rank == 0 and (step + 1) % 20 == 0:
            print(f"step {step + 1}: loss {done.loss:.6f}, gradient norm {done.gradient_norm:.6f}", flush=True)
    trained.close()


if __name__ == "__main__":
    main()
