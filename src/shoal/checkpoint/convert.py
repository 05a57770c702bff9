"""A checkpoint into other files, into a Hugging Face folder, and from one, in one process and little memory.

Whatever the size of the tensors, about a block of 1 MiB of them is in memory, beside the manifest. The results are
written as checkpoints are: under another name, with a checksum, synced, renamed.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from shoal import job
from shoal.checkpoint import contents, folders, hf_folder, manifest, safetensors
from shoal.checkpoint.blocks import ITEM_BYTES, Box, size, whole
from shoal.checkpoint.manifest import File, Manifest, Tensor
from shoal.checkpoint.safetensors import Part
from shoal.checkpoint.stage import staged
from shoal.data import tokenizer as tokenizers
from shoal.errors import CheckpointError, ModelError
from shoal.job import Job, Layout
from shoal.job.data import DataOptions
from shoal.job.model import ModelOptions
from shoal.models import config
from shoal.models.spec import parameters

FILE_BYTES = 5 << 30
# What transformers calls the types of weights.
_WORDS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass
class _Progress:
    """Says now and then how much of `total` bytes is done."""

    total: int
    say: Callable[[str], None]
    done: int = 0
    last: float = field(default_factory=time.monotonic)

    def add(self, count: int) -> None:
        self.done += count
        if time.monotonic() - self.last > 10.0:
            self.last = time.monotonic()
            self.say(f"{100 * self.done // max(self.total, 1)} % of {self.total / 1e9:.1f} GB")


def reshard(
    checkpoint: Path, out: Path, *, pieces: int = 0, file_bytes: int = FILE_BYTES, say: Callable[[str], None] = print
) -> None:
    """Writes the same checkpoint, the optimizer's state too, into other files. Every bit of every tensor stays.

    pieces: how many files, equal but for one row of a tensor; 0 = as many as have about `file_bytes`.
    Raises CheckpointError if `out` exists or cannot be written.
    """
    with staged(out) as draft:
        _write(draft, checkpoint, manifest.read(checkpoint), pieces, file_bytes, say)


def _write(
    folder: Path, source: Path, what: Manifest, pieces: int, file_bytes: int, say: Callable[[str], None]
) -> None:
    """A checkpoint of what is in the files of `source`."""
    total = sum(map(size, what.tensors.values()))
    files: dict[str, File] = {}
    tensors = {name: Tensor(tensor.dtype, tensor.shape, []) for name, tensor in what.tensors.items()}
    progress = _Progress(total, say)
    for parts in spread(what.tensors, pieces or max(1, -(-total // file_bytes))):
        name = f"file-{len(files):05d}.safetensors"
        files[name], places = safetensors.write(folder / name, parts, source, advance=progress.add)
        for part, place in zip(parts, places, strict=True):
            tensors[part.name].pieces.append(place)
    written = Manifest(step=what.step, values=what.values, files=files, tensors=manifest.join([tensors]))
    (folder / manifest.FILE).write_bytes(manifest.seal(msgspec.json.encode(written)))


def spread(tensors: dict[str, Tensor], count: int) -> Iterator[list[Part]]:
    """What goes into each of `count` files of equal size; cuts are between rows. Files without a row are left out.

    All tensors stand in a line, the widest numbers first, and each row is in the file in whose part of the line it
    begins.
    """
    line = sorted(tensors.items(), key=lambda entry: -ITEM_BYTES[entry[1].dtype])
    total = sum(map(size, tensors.values()))
    for index in range(count):
        parts, at = [], 0
        for name, tensor in line:
            if size(tensor):
                begin, end = (_row(tensor, at, total * edge, count) for edge in (index, index + 1))
                if begin < end:
                    parts.append(Part(name, tensor, _rows(tensor, begin, end), tensor.dtype))
            at += size(tensor)
        if parts:
            yield parts


def _row(tensor: Tensor, at: int, edge: int, count: int) -> int:
    """The first row that begins at or behind byte `edge / count` of the line, in which the tensor begins at `at`."""
    rows = tensor.shape[0] if tensor.shape else 1
    return min(max(-(-(edge - at * count) * rows // (size(tensor) * count)), 0), rows)


def _rows(tensor: Tensor, begin: int, end: int) -> Box:
    if not tensor.shape:
        return whole(tensor)
    return Box((begin, *(0 for _ in tensor.shape[1:])), (end - begin, *tensor.shape[1:]))


def export_hf(
    checkpoint: Path,
    out: Path,
    *,
    dtype: str | None = None,
    file_bytes: int = FILE_BYTES,
    say: Callable[[str], None] = print,
) -> None:
    """Writes the model of a checkpoint as a folder that `transformers` reads; the same bytes as a run's `model`.

    dtype: of the weights, `F32` or `BF16`; None = as saved. file_bytes: of a file at most, if not of one tensor.
    Raises CheckpointError if the checkpoint is in no run's folder, or has other tensors than the run's model; or if
    `out` exists or cannot be written.
    """
    run = contents.home(checkpoint)
    options = job.read(run / "job.toml").model
    files = list(_files(_weights(checkpoint, options, dtype), file_bytes))
    total = sum(part.size for parts in files for part in parts)
    progress = _Progress(total, say)
    start, end = _edges(run)
    with staged(out) as draft:
        for index, parts in enumerate(files):
            safetensors.write(
                draft / hf_folder.file_name(index, len(files)),
                sorted(parts, key=lambda part: (-ITEM_BYTES[part.dtype], part.name)),
                checkpoint,
                cast=_cast,
                advance=progress.add,
            )
        hf_folder.write_index(draft, [[part.name for part in parts] for parts in files], total)
        hf_folder.write_words(
            draft, options, _WORDS[files[-1][-1].dtype],
            tokenizer=run if (run / "tokenizer.json").is_file() else None,
            start_token=start, end_token=end, source=_source(run, options),
        )  # fmt: skip


def _weights(checkpoint: Path, options: ModelOptions, dtype: str | None) -> list[Part]:
    """The model's parameters in the order of the forward pass, each found in the checkpoint."""
    what, expected = manifest.read(checkpoint), parameters(options)
    fix = "is it of this run? Each needs the job.toml of its own"
    strangers = sorted(set(contents.model_tensors(what)) - set(expected))
    if strangers:
        where = f"{len(strangers)} tensors are more than the model of job.toml has, e.g. '{strangers[0]}'"
        raise CheckpointError(where, where=str(checkpoint), fix=fix)
    parts = []
    for name, spec in expected.items():
        tensor = what.tensors.get(name)
        if tensor is None:
            raise CheckpointError(f"tensor '{name}' is missing", where=str(checkpoint), fix=fix)
        if tensor.shape != spec.shape or tensor.dtype not in _WORDS:
            shapes = f"is {tensor.dtype} {list(tensor.shape)}, the job makes it {list(spec.shape)}"
            raise CheckpointError(f"tensor '{name}' {shapes}", where=str(checkpoint), fix=fix)
        parts.append(Part(name, tensor, whole(tensor), dtype or tensor.dtype))
    return parts


def _files(parts: list[Part], file_bytes: int) -> Iterator[list[Part]]:
    """Neighbouring tensors, together at most `file_bytes` (or one tensor)."""
    held: list[Part] = []
    for part in parts:
        if held and sum(other.size for other in held) + part.size > file_bytes:
            yield held
            held = []
        held.append(part)
    yield held


def _cast(block: memoryview, dtype: str, wanted: str) -> memoryview:
    """Rounds to the nearest, as torch does."""
    import torch

    from shoal.checkpoint.pack import DTYPES

    numbers = torch.frombuffer(block, dtype=DTYPES[dtype]).to(DTYPES[wanted])
    return numbers.view(torch.uint8).numpy().data


def _edges(run: Path) -> tuple[int | None, int | None]:
    """Ids of the tokens that begin and end a document."""
    if not (run / "tokenizer.json").is_file():
        return None, None
    known = tokenizers.load(run)
    return known.start, known.end


def _source(run: Path, options: ModelOptions) -> Path | None:
    """The folder that says what else ends a text."""
    if (run / hf_folder.GENERATION).is_file():
        return run
    return Path(options.weights) if options.weights else None


def import_hf(
    folder: Path,
    out: Path,
    *,
    file_bytes: int = FILE_BYTES,
    begin: Callable[[Path], None] | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Makes a run folder `out` of a Hugging Face folder: job.toml, tokenizer, and a checkpoint of step 0.

    The weights keep their dtype and every bit. There is no optimizer state: it begins at zero. begin: makes the run
    folder that it is given, with the job to be trained; without it, the job has the folder's model and defaults.
    Raises ModelError if the folder cannot be used, CheckpointError if `out` exists or cannot be written.
    """
    options = replace(config.read(folder), weights=os.path.abspath(folder))
    values = {"step": 0, "position": 0, "update": {"updates": 0}, "sync": {}}
    what = Manifest(step=0, values=values, files={}, tensors=_found(folder, options))
    with staged(out) as draft:
        if begin is not None:
            begin(draft)
        else:
            data = DataOptions(tokenizer=os.path.abspath(folder))
            made = Job(layout=Layout(), model=options, data=data)
            (draft / "job.toml").write_text(job.write(made), encoding="utf-8")
        _copy_words(folder, draft)
        saved = draft / "checkpoints" / folders.name_of(0)
        saved.mkdir(parents=True)
        _write(saved, folder, what, 0, file_bytes, say)


def _found(folder: Path, options: ModelOptions) -> dict[str, Tensor]:
    """The parameters of the model, each in its place in the files of the folder."""
    files, expected = hf_folder.files(folder), parameters(options)
    hf_folder.refuse_strangers(folder, files, expected, options.tie_word_embeddings)
    headers: dict[str, dict[str, Tensor]] = {}
    found = {}
    for name, spec in expected.items():
        if name not in files:
            raise hf_folder.missing(folder, name)
        path = folder / files[name]
        if files[name] not in headers:
            headers[files[name]] = safetensors.read_header(path)
        if name not in headers[files[name]]:
            raise ModelError(f"tensor '{name}' is missing", where=str(path), fix="fetch the folder again")
        found[name] = headers[files[name]][name]
        hf_folder.check(path, name, found[name].dtype, found[name].shape, spec.shape)
    return found


def _copy_words(folder: Path, run: Path) -> None:
    """The tokenizer, where the run has none yet, and what ends a text."""
    if not (run / "tokenizer.json").exists():
        for name in hf_folder.TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, run / name)
    if (folder / hf_folder.GENERATION).is_file():
        shutil.copyfile(folder / hf_folder.GENERATION, run / hf_folder.GENERATION)
    else:
        said = config.read_json(folder / "config.json")
        hf_folder.write_json(
            run / hf_folder.GENERATION, {key: said.get(key) for key in ("bos_token_id", "eos_token_id")}
        )
