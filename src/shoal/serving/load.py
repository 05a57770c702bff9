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
    """The model in eval mode, in float32 on the CPU: `model(input_ids)` gives logits (B, L, V).

    path: a run folder (its newest whole checkpoint, or the `model` folder of a finished run), the folder of
    one checkpoint, or a folder with config.json and safetensors. say: gets a line for each damaged checkpoint
    passed over. Raises ModelError or CheckpointError that says what is missing or damaged.
    """
    path, home = Path(path), home_of(path)
    if (path / "config.json").is_file():
        model = build(config.read(path))
        huggingface.load(path, _shards(model))
    elif home == path:
        newest = checkpoint.newest(path / "checkpoints", say)
        if newest is None and (path / "model").is_dir():
            return load(path / "model", say)
        if newest is None:
            raise ModelError(
                "the run has no checkpoint yet", where=str(path), fix="train it, or wait for its first one"
            )
        model = _of_run(path, newest, verified=True)
    else:
        model = _of_run(home, path)
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


def _of_run(run: Path, saved: Path, verified: bool = False) -> Decoder:
    model = build(job.read(run / "job.toml").model)
    checkpoint.load(saved, _shards(model), verified=verified)
    return model


def _shards(model: Decoder) -> list[Shard]:
    return [Shard(name, tuple(p.shape), (0,) * p.ndim, p.detach()) for name, p in model.named_parameters()]
