"""A trained model from a run folder, one of its checkpoints, or a folder in Hugging Face's format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shoal import checkpoint, job
from shoal.checkpoint import huggingface
from shoal.errors import ModelError
from shoal.job.model import ModelOptions
from shoal.models import build, config
from shoal.models.decoder import Decoder
from shoal.models.storage import canonical
from shoal.shard import Shard

Part = Callable[[ModelOptions], range]
"""Which consecutive blocks of the model."""


def load(path: str | Path, say: Callable[[str], None] = print, part: Part | None = None) -> Decoder:
    """The model in eval mode, in float32 on the CPU: `model(input_ids)` gives logits (B, L, V).

    path: a run folder (its newest whole checkpoint, or the `model` folder of a finished run), the folder of
    one checkpoint, or a folder with config.json and safetensors. say: gets a line for each damaged checkpoint
    passed over. part: only these blocks, with the embedding if they are the first and the head if the last. Raises
    ModelError or CheckpointError that says what is missing or damaged.
    """
    path, home = Path(path), home_of(path)
    if (path / "config.json").is_file():
        model = _built(config.read(path), part)
        huggingface.load(path, _shards(model))
    elif home == path:
        newest = checkpoint.newest(path / "checkpoints", say)
        if newest is None and (path / "model").is_dir():
            return load(path / "model", say, part)
        if newest is None:
            raise ModelError(
                "the run has no checkpoint yet", where=str(path), fix="train it, or wait for its first one"
            )
        model = _of_run(path, newest, part, verified=True)
    else:
        model = _of_run(home, path, part)
    return model.eval()


def home_of(path: str | Path) -> Path:
    """The folder with the job or config, and the tokenizer, of a model: `path`, or the run whose checkpoint it is.

    Raises ModelError for anything else.
    """
    path = Path(path)
    if (path / "config.json").is_file() or (path / "job.toml").is_file():
        return path
    run = path.absolute().parent.parent
    if path.is_dir() and path.absolute().parent.name == "checkpoints" and (run / "job.toml").is_file():
        return run
    what = "there is no such folder"
    if path.is_dir():
        what = "is no run and no model: it holds neither job.toml nor config.json"
    elif path.exists():
        what = "is a file, neither a run nor a model folder"
    raise ModelError(what, where=str(path), fix="give a run folder or a Hugging Face folder")


def _built(options: ModelOptions, part: Part | None) -> Decoder:
    return build(options, part(options) if part else None)


def _of_run(run: Path, saved: Path, part: Part | None, verified: bool = False) -> Decoder:
    model = _built(job.read(run / "job.toml").model, part)
    checkpoint.load(saved, _shards(model), verified=verified)
    return model


def _shards(model: Decoder) -> list[Shard]:
    return [Shard(name, tuple(p.shape), (0,) * p.ndim, p) for name, p in canonical(model)]
