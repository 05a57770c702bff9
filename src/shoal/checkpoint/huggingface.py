"""Weights in Hugging Face's format (safetensors, one file or several with an index): read by the slice, and
written.

Only safetensors files are read: their header is JSON and the rest raw numbers, so that loading runs no code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from shoal.checkpoint import fp8, hf_folder
from shoal.checkpoint.blocks import Box, split
from shoal.checkpoint.fp8 import Scales
from shoal.errors import ModelError
from shoal.job.model import ModelOptions
from shoal.models.spec import ParameterSpec, parameters
from shoal.shard import Shard


def load(folder: Path, wanted: Iterable[Shard], say: Callable[[str], None] = lambda line: None) -> None:
    """Fills each shard's `local` in place, reading only its slice; casts to its dtype and device.

    Weights in fp8 are multiplied by their scales on the way, 256 Ki elements at a time. say: is told what of the folder
    is left out. Raises ModelError that names file and tensor: a file or tensor is missing, torn, of another shape or
    type; or the folder holds tensors that its config.json does not account for.
    """
    _, files, storage = hf_folder.weights(folder, say)
    scales = Scales(folder, files, storage.block) if storage.block else None
    by_file: dict[str, list[Shard]] = {}
    for shard in wanted:
        if shard.name not in files:
            raise hf_folder.missing(folder, shard.name)
        by_file.setdefault(files[shard.name], []).append(shard)
    for name, shards in by_file.items():
        with _open(folder / name) as file:
            for shard in shards:
                _read(file, folder / name, shard, scales)


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except FileNotFoundError:
        raise ModelError("there is no such file", where=str(path), fix="fetch the folder again") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"is damaged: {error}", where=str(path), fix="fetch the file again") from None


@torch.no_grad()
def _read(file: Any, path: Path, shard: Shard, scales: Scales | None) -> None:
    try:
        whole = file.get_slice(shard.name)
    except SafetensorError:
        raise ModelError(f"tensor '{shard.name}' is missing", where=str(path), fix="fetch the folder again") from None
    fp8.check(path, shard.name, whole.get_dtype(), tuple(whole.get_shape()), shard.global_shape, scales)
    box = Box(tuple(shard.offsets), tuple(shard.local.shape))
    if scales is not None and whole.get_dtype() == fp8.DTYPE:
        found = scales.find(shard.name, shard.global_shape)
        for part in split(box, fp8.LIMIT):
            shard.local[part.within(box)] = scales.dequantise(found, part, whole[part.within()])
    elif shard.local.numel():
        shard.local.copy_(whole[box.within()])


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
    of a chat, say) still does. dtype: of the weights, default as they come; what no gradient
    reaches, as a router's bias, keeps its own. config.json is written last: a
    folder that has one is whole. Raises ModelError if the disk is full or the folder cannot be written.
    """
    specs = parameters(options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in [
            *folder.glob("model*.safetensors"),
            *folder.glob("*.part"),
            folder / hf_folder.INDEX,
            folder / "config.json",
        ]:
            stale.unlink(missing_ok=True)
        written = _write_weights(tensors, specs, folder, dtype, file_bytes)
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
    specs: dict[str, ParameterSpec],
    folder: Path,
    dtype: torch.dtype | None,
    file_bytes: int,
) -> torch.dtype:
    """Returns the dtype of the weights. Files get their final names once it is known how many there are."""
    parts: list[list[str]] = []
    total, seen = 0, torch.float32
    for part in _parts(tensors, specs, dtype, file_bytes):
        for name, tensor in part.items():
            shape = specs[name].shape if name in specs else None
            assert tuple(tensor.shape) == shape, f"{name}: {tuple(tensor.shape)}, not {shape}"
            total += tensor.nbytes
            seen = tensor.dtype if specs[name].learned else seen
        save_file(part, folder / f"{len(parts)}.part", metadata={"format": "pt"})
        parts.append(list(part))
    names = [name for part in parts for name in part]
    assert sorted(names) == sorted(specs), f"missing or doubled: {sorted(set(specs) ^ set(names))}"
    for index in range(len(parts)):
        os.replace(folder / f"{index}.part", folder / hf_folder.file_name(index, len(parts)))
    hf_folder.write_index(folder, parts, total)
    return seen


def _parts(
    tensors: Iterable[tuple[str, Tensor]],
    specs: dict[str, ParameterSpec],
    dtype: torch.dtype | None,
    file_bytes: int,
) -> Iterator[dict[str, Tensor]]:
    """Neighbouring tensors, together at most `file_bytes` (or one tensor)."""
    part: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        kind = dtype if dtype and specs[name].learned else tensor.dtype
        bytes_ = prod(tensor.shape) * kind.itemsize
        if part and size + bytes_ > file_bytes:
            yield part
            part, size = {}, 0
        part[name] = tensor.detach().to("cpu", kind).contiguous()
        size += bytes_
    if part:
        yield part
