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
from functools import partial
from pathlib import Path

import msgspec

from shoal import job
from shoal.checkpoint import contents, folders, fp8, hf_folder, manifest, safetensors
from shoal.checkpoint.blocks import ITEM_BYTES, Box, whole
from shoal.checkpoint.fp8 import Scales
from shoal.checkpoint.manifest import File, Manifest, Tensor
from shoal.checkpoint.safetensors import Cast, Part
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
        what = manifest.read(checkpoint)
        parts = [Part(name, tensor, whole(tensor), tensor.dtype) for name, tensor in what.tensors.items()]
        _write(draft, checkpoint, what, parts, pieces or _count(parts, file_bytes), say)


def _count(parts: list[Part], file_bytes: int) -> int:
    return max(1, -(-sum(part.size for part in parts) // file_bytes))


def _write(
    folder: Path,
    source: Path,
    what: Manifest,
    parts: list[Part],
    count: int,
    say: Callable[[str], None],
    cast: Cast | None = None,
) -> None:
    """A checkpoint of the parts, which are whole tensors in the files of `source`. what: step and values."""
    files: dict[str, File] = {}
    tensors = {part.name: Tensor(part.dtype, part.tensor.shape, []) for part in parts}
    progress = _Progress(sum(part.size for part in parts), say)
    for held in spread(parts, count):
        name = f"file-{len(files):05d}.safetensors"
        files[name], places = safetensors.write(folder / name, held, source, cast=cast, advance=progress.add)
        for part, place in zip(held, places, strict=True):
            tensors[part.name].pieces.append(place)
    written = Manifest(step=what.step, values=what.values, files=files, tensors=manifest.join([tensors]))
    (folder / manifest.FILE).write_bytes(manifest.seal(msgspec.json.encode(written)))


def spread(wholes: list[Part], count: int) -> Iterator[list[Part]]:
    """What goes into each of `count` files of equal size; cuts are between rows. Files without a row are left out.

    All tensors stand in a line, the widest numbers first, and each row is in the file in whose part of the line it
    begins.
    """
    line = sorted(wholes, key=lambda part: -ITEM_BYTES[part.dtype])
    total = sum(part.size for part in wholes)
    for index in range(count):
        parts, at = [], 0
        for one in line:
            if one.size:
                begin, end = (_row(one, at, total * edge, count) for edge in (index, index + 1))
                if begin < end:
                    parts.append(one._replace(box=_rows(one.tensor, begin, end)))
            at += one.size
        if parts:
            yield parts


def _row(part: Part, at: int, edge: int, count: int) -> int:
    """The first row that begins at or behind byte `edge / count` of the line, in which the tensor begins at `at`."""
    rows = part.box.shape[0] if part.box.shape else 1
    return min(max(-(-(edge - at * count) * rows // (part.size * count)), 0), rows)


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

    dtype: of the weights, `F32` or `BF16`; None = as saved. What no gradient reaches keeps its own. file_bytes: of a
    file at most, if not of one tensor.
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
            draft, options, _WORDS[files[0][0].dtype],
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
        # A router's bias moves by less than a step of bf16.
        parts.append(Part(name, tensor, whole(tensor), dtype if dtype and spec.learned else tensor.dtype))
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


def _cast(block: memoryview, part: Part, box: Box) -> memoryview:
    """Rounds to the nearest, as torch does."""
    import torch

    from shoal.checkpoint.pack import DTYPES

    numbers = torch.frombuffer(block, dtype=DTYPES[part.tensor.dtype]).to(DTYPES[part.dtype])
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

    The weights keep their dtype and every bit, but for those in fp8, which become the float32 numbers that are meant:
    as a run that starts from the folder computes with. There is no optimizer state: it begins at zero. begin: makes the
    run folder that it is given, with the job to be trained; without it, the job has the folder's model and defaults.
    Raises ModelError if the folder cannot be used, CheckpointError if `out` exists or cannot be written.
    """
    options = replace(config.read(folder), weights=os.path.abspath(folder))
    values = {"step": 0, "position": 0, "update": {"updates": 0}, "sync": {}}
    what = Manifest(step=0, values=values, files={}, tensors={})
    weights = hf_folder.weights(folder, say)
    scales = Scales(folder, weights.files, weights.storage.block) if weights.storage.block else None
    parts = _found(folder, weights, scales)
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
        _write(saved, folder, what, parts, _count(parts, file_bytes), say, partial(_dequantised, scales))


def _found(folder: Path, weights: hf_folder.Weights, scales: Scales | None) -> list[Part]:
    """The parameters of the model, each in its place in the files of the folder."""
    files = weights.files
    headers: dict[str, dict[str, Tensor]] = {}
    parts = []
    for name, spec in weights.specs.items():
        if name not in files:
            raise hf_folder.missing(folder, name)
        path = folder / files[name]
        if files[name] not in headers:
            headers[files[name]] = safetensors.read_header(path)
        if name not in headers[files[name]]:
            raise ModelError(f"tensor '{name}' is missing", where=str(path), fix="fetch the folder again")
        found = headers[files[name]][name]
        fp8.check(path, name, found.dtype, found.shape, spec.shape, scales)
        quantised = found.dtype == fp8.DTYPE
        parts.append(Part(name, found, whole(found), "F32" if quantised else found.dtype))
    return parts


def _dequantised(scales: Scales | None, block: memoryview, part: Part, box: Box) -> memoryview:
    import torch

    assert scales is not None
    found = scales.find(part.name, part.tensor.shape)
    stored = torch.frombuffer(block, dtype=torch.float8_e4m3fn).view(box.shape)
    return scales.dequantise(found, box, stored).flatten().view(torch.uint8).numpy().data


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
