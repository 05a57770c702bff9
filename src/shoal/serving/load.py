"""A trained model's weights, into a model that is whole here or into the pieces of one that ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from shoal import checkpoint
from shoal.checkpoint import huggingface
from shoal.models import build
from shoal.models.decoder import Decoder
from shoal.models.storage import canonical
from shoal.serving.source import Source, find
from shoal.shard import Shard


def load(path: str | Path, say: Callable[[str], None] = print) -> Decoder:
    """The model in eval mode, in float32 on the CPU: `model(input_ids)` gives logits (B, L, V).

    path: a run folder (its newest whole checkpoint, or the `model` folder of a finished run), the folder of
    one checkpoint, or a folder with config.json and safetensors. say: gets a line for each damaged checkpoint
    passed over, and one for layers of a Hugging Face folder that are left out. Raises ModelError or CheckpointError
    that says what is missing or damaged.
    """
    source = find(path, say)
    model = build(source.options)
    fill(source, [Shard(name, tuple(p.shape), (0,) * p.ndim, p) for name, p in canonical(model)], say)
    return model.eval()


def fill(source: Source, pieces: Iterable[Shard], say: Callable[[str], None] = lambda line: None) -> None:
    """Fills each piece's `local` in place, reading only what lies in it. say: is told what of a Hugging Face folder is
    left out. Raises as `load`."""
    if (source.folder / "config.json").is_file():
        huggingface.load(source.folder, pieces, say)
    else:
        checkpoint.load(source.folder, pieces, verified=True)
