"""A trained model from a run folder, one of its checkpoints, or a folder in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shoal import checkpoint, job
from shoal.checkpoint import huggingface
from shoal.errors import ModelError
from shoal.models import build, config
from shoal.models.decoder import Decoder
from shoal.shard import Shard


def load(path: str | Path, say: Callable[[str], None] = print) -> Decoder:
    """The model in eval mode, in float32 on the CPU: `model(tokens_BL)` gives logits (B, L, V).

    path: a run folder (its newest whole checkpoint, or the `model` folder of a finished run), the folder of
    one checkpoint, or a folder with config.json and safetensors. say: gets a line for each damaged checkpoint
    passed over. Raises ModelError or CheckpointError that says what is missing or damaged.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError("there is no such folder", where=str(path), fix="give a run folder or a Hugging Face folder")
    if (path / "config.json").is_file():
        model = build(config.read(path))
        huggingface.load(path, _shards(model))
    elif (path / "job.toml").is_file():
        newest = checkpoint.newest(path / "checkpoints", say)
        if newest is None and (path / "model").is_dir():
            return load(path / "model", say)
        if newest is None:
            raise ModelError(
                "the run has no checkpoint yet", where=str(path), fix="train it, or wait for its first one"
            )
        model = _of_run(path, newest, verified=True)
    elif (path.parent.parent / "job.toml").is_file():
        model = _of_run(path.parent.parent, path)
    else:
        raise ModelError(
            "holds neither job.toml nor config.json",
            where=str(path),
            fix="give a run folder or a Hugging Face folder",
        )
    return model.eval()


def _of_run(run: Path, saved: Path, verified: bool = False) -> Decoder:
    model = build(job.read(run / "job.toml").model)
    checkpoint.load(saved, _shards(model), verified=verified)
    return model


def _shards(model: Decoder) -> list[Shard]:
    return [Shard(name, tuple(p.shape), (0,) * p.ndim, p.detach()) for name, p in model.named_parameters()]
