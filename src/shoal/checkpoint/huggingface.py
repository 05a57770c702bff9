"""Weights in Hugging Face's format (safetensors, one file or several with an index): read by the slice, and
written.

Only safetensors files are read: their header is JSON and the rest raw numbers, so that loading runs no code.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.checkpoint import hf_folder
from shoal.errors import ModelError
from shoal.job.model import ModelOptions
from shoal.models import config
from shoal.models.spec import parameters
from shoal.shard import Shard


def load(folder: Path, wanted: Iterable[Shard]) -> None:
    """Fills each shard's `local` in place, reading only its slice; casts to its dtype and device.

    Raises ModelError that names file and tensor: a file or tensor is missing, torn, of another shape or type;
    or the folder holds tensors that its config.json does not account for.
    """
    expected = parameters(config.read(folder))
    files = hf_folder.files(folder)
    hf_folder.refuse_strangers(folder, files, expected, config.read(folder).tie_word_embeddings)
    by_file: dict[str, list[Shard]] = {}
    for shard in wanted:
        if shard.name not in files:
            raise hf_folder.missing(folder, shard.name)
        by_file.setdefault(files[shard.name], []).append(shard)
    for name, shards in by_file.items():
        with _open(folder / name) as file:
            for shard in shards:
                _read(file, folder / name, shard)


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise ModelError("there is no such file", where=str(path), fix="fetch the folder again") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"is damaged: {error}", where=str(path), fix="fetch the file again") from None


def _read(file: Any, path: Path, shard: Shard) -> None:
    try:
        whole = file.get_slice(shard.name)
    except SafetensorError:
        raise ModelError(f"tensor '{shard.name}' is missing", where=str(path), fix="fetch the folder again") from None
    hf_folder.check(path, shard.name, whole.get_dtype(), tuple(whole.get_shape()), shard.global_shape)
    if shard.local.numel():
        place = tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.local.shape, strict=True))
        with torch.no_grad():
            shard.local.copy_(whole[place])


def export(
    options: ModelOptions,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    tokenizer: Path | None = None,
    start_token: int | None = None,
    end_token: int | None = None,
    source: Path | None = None,
    dtype: torch.dtype | None = None,
    file_bytes: int = 5 << 30,
) -> None:
    """Writes a folder that `transformers` reads.

    tensors: every parameter once, by canonical name, whole, in any order; taken one at a time, one file's
    worth held. tokenizer: folder with tokenizer.json to be copied, or that file. start_token, end_token: ids
    that begin and end a document. source: folder that training began from; what else ends a text there (a turn
    of a chat, say) still does. dtype: of the weights, default as they come. config.json is written last: a
    folder that has one is whole. Raises ModelError if the disk is full or the folder cannot be written.
    """
    shapes = {name: spec.shape for name, spec in parameters(options).items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [
            *folder.glob("model*.safetensors"),
            *folder.glob("*.part"),
            folder / hf_folder.INDEX,
            folder / "config.json",
        ]:
            stale.unlink(missing_ok=True)
        written = _write_weights(tensors, shapes, folder, dtype, file_bytes)
        hf_folder.write_words(
            folder, options, str(written).removeprefix("torch."),
            tokenizer=tokenizer, start_token=start_token, end_token=end_token, source=source,
        )  # fmt: skip
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot be written: {error}", where=str(folder), fix="free disk space, or name another folder"
        ) from None


def _write_weights(
    tensors: Iterable[tuple[str, Tensor]],
    shapes: dict[str, tuple[int, ...]],
    folder: Path,
    dtype: torch.dtype | None,
    file_bytes: int,
) -> torch.dtype:
    """Returns the dtype of the weights. Files get their final names once it is known how many there are."""
    parts: list[list[str]] = []
    total, seen = 0, torch.float32
    for part in _parts(tensors, dtype, file_bytes):
        for name, tensor in part.items():
            assert tuple(tensor.shape) == shapes.get(name), f"{name}: {tuple(tensor.shape)}, not {shapes.get(name)}"
            total, seen = total + tensor.nbytes, tensor.dtype
        save_file(part, folder / f"{len(parts)}.part", metadata={"format": "pt"})
        parts.append(list(part))
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(shapes), f"missing or doubled: {sorted(set(shapes) ^ set(names))}"
    for index in range(len(parts)):
        os.replace(folder / f"{index}.part", folder / hf_folder.file_name(index, len(parts)))
    hf_folder.write_index(folder, parts, total)
    return seen


def _parts(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, file_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Neighbouring tensors, together at most `file_bytes` (or one tensor)."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        kind = dtype or tensor.dtype
        bytes_ = prod(tensor.shape) * kind.itemsize
        if part and size + bytes_ > file_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().to("cpu", kind).contiguous()
        size += bytes_
    if part:
        yield part
