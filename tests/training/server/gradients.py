"""What workers pushed, against what transformers computes from what they had pulled."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from shoal.data.batch import Batch
from shoal.data.loader import Loader
from shoal.data.prepare import prepare
from shoal.job import read
from shoal.models.config import to_hf
from shoal.sync.server.messages import Key, Piece, Stage
from shoal.sync.server.node.shard_log import ShardLog
from tests.training.server import noted, runs

# Of a gradient's norm. In float32, where a norm of 300 comes of an embedding that shrank to nothing, measured: 2e-5.
FAR = 1e-3


def assert_follow(run: Path) -> int:
    """Every push that was committed, and of which the pull was noted, of parameters that lie whole on one shard: its
    loss, its weight and its gradient are those in float64 of the version that was pulled, on the samples that were
    used. Returns how many there were; the logs of the shards must have been kept."""
    job, commits = read(run / "job.toml"), runs.history(run)[0]
    corpus = prepare(job.data, job.train.seed, say=lambda line: None)
    loader = Loader(corpus, job.data, "train", job.train.global_batch, job.train.seed)
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def look(shard: int, version: int, parameters) -> None:
        found = weights.setdefault(version, {})
        found |= {each.name: each.local.clone() for each in parameters.shards}

    runs.replayed(run, look)
    staged = _staged(run, job.server.shards)
    model = LlamaForCausalLM(LlamaConfig(**to_hf(job.model), attn_implementation="eager")).double()
    checked = 0
    for key, version in _pulled(run).items():
        for commit in commits.values():
            if version == 0 or key not in commit.keys:
                continue
            i = commit.keys.index(key)
            start, stop = commit.samples[i]
            rows = loader.rows(loader.order(np.arange(start, stop)))
            loss, weight, gradients = _gradient(model, weights[version], rows)
            assert commit.weights[i] == weight
            assert abs(commit.losses[i] - loss) < 1e-5 * loss, f"the loss of {key}, of version {version}"
            norm = sum(each.norm() ** 2 for each in gradients.values()) ** 0.5
            for name, theirs in gradients.items():
                ours = torch.zeros_like(theirs)
                for piece, tensor in staged[key]:
                    if piece.name == name:
                        extents = zip(piece.offsets, piece.shape, strict=True)
                        ours[tuple(slice(at, at + n) for at, n in extents)] = tensor
                assert (ours - theirs).norm() < FAR * norm, f"{name} of {key}, of version {version}"
            checked += 1
    return checked


def _gradient(
    model: LlamaForCausalLM, weights: dict[str, torch.Tensor], batch: Batch
) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Sums over the tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.zero_grad()
    documents_BL = batch.document_BL
    length = documents_BL.shape[1]
    seen_BLL = (documents_BL[:, :, None] == documents_BL[:, None, :]) & torch.ones(length, length).tril().bool()
    mask_B1LL = torch.zeros(seen_BLL.shape, dtype=torch.float64).masked_fill(~seen_BLL, -torch.inf)[:, None]
    logits_BLV = model(batch.tokens_BL, attention_mask=mask_B1LL, position_ids=batch.position_BL.long()).logits
    losses_N = cross_entropy(logits_BLV.flatten(0, 1), batch.labels_BL.flatten(), reduction="none")
    loss = (losses_N * batch.weight_BL.flatten()).sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return loss.item(), batch.weight_BL.sum().item(), gradients


def _staged(run: Path, shards: int) -> dict[Key, list[tuple[Piece, torch.Tensor]]]:
    found: dict[Key, dict[tuple, tuple[Piece, torch.Tensor]]] = {}
    for number in range(shards):
        log = ShardLog(run / "server" / f"shard-{number}", torch.float32)
        for message, tensors in log.read():
            if isinstance(message, Stage):
                parts = found.setdefault(message.key, {})
                # Whoever is asked again sends the same once more.
                parts |= {(p.name, p.offsets): (p, t.clone()) for p, t in zip(message.pieces, tensors, strict=True)}
        log.close()
    return {key: list(parts.values()) for key, parts in found.items()}


def _pulled(run: Path) -> dict[Key, int]:
    """The version that was pulled at each key, where it was one on all shards."""
    found = {}
    for notes in noted.notes(run, "pull").values():
        for note in notes:
            versions = {version for version, _, _ in note["shards"].values()}
            if note["agreed"] and note["key"] and len(versions) == 1:
                found[Key(*note["key"])] = versions.pop()
    return found
