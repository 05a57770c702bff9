"""Weights in Hugging Face's format (safetensors, one file or several with an index): read by the slice, and
written.

Only safetensors files are read: their header is JSON and the rest raw numbers, so that loading runs no code.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from shoal.errors import ModelError
from shoal.job.model import ModelOptions
from shoal.models import config
from shoal.models.spec import parameters
from shoal.shard import Shard

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
# Derived or doubled tensors that published folders hold, and that a model does without.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias")


def load(folder: Path, wanted: Iterable[Shard]) -> None:
    """Fills each shard's `local` in place, reading only its slice; casts to its dtype and device.

    Raises ModelError that names file and tensor: a file or tensor is missing, torn, of another shape or type;
    or the folder holds tensors that its config.json does not account for.
    """
    expected = parameters(config.read(folder))
    files = _files(folder)
    _no_strangers(folder, files, expected, config.read(folder).tie_word_embeddings)
    by_file: dict[str, list[Shard]] = {}
    for shard in wanted:
        if shard.name not in files:
            raise ModelError(
                f"tensor '{shard.name}' is in none of its files",
                where=str(folder),
                fix="fetch the folder again",
            )
        by_file.setdefault(files[shard.name], []).append(shard)
    for name, shards in by_file.items():
        with _open(folder / name) as file:
            for shard in shards:
                _read(file, folder / name, shard)


def _files(folder: Path) -> dict[str, str]:
    """Tensor name -> file that holds it."""
    if (folder / _INDEX).exists():
        files = config.read_json(folder / _INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ModelError("has no weight_map", where=str(folder / _INDEX), fix="fetch the file again")
        return files
    if (folder / _SINGLE).exists():
        with _open(folder / _SINGLE) as file:
            return dict.fromkeys(file.keys(), _SINGLE)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    raise ModelError(
        f"there is no {_SINGLE}" + (f", only {pickled[0]}, which could run code when loaded" if pickled else ""),
        where=str(folder),
        fix="save the model with transformers' save_pretrained, which writes safetensors",
    )


def _no_strangers(folder: Path, files: Iterable[str], expected: Iterable[str], tied: bool) -> None:
    """Weights that would be left out in silence make another model than the one in the folder."""
    known = {*expected, "lm_head.weight"} if tied else set(expected)
    strangers = sorted(name for name in files if name not in known and not name.endswith(_DERIVED))
    if strangers:
        raise ModelError(
            f"{len(strangers)} tensors are more than its config.json accounts for, e.g. '{strangers[0]}'",
            where=str(folder),
            fix="is config.json of the same model? (biases: attention_bias, mlp_bias)",
        )


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
    if tuple(whole.get_shape()) != shard.global_shape:
        raise ModelError(
            f"tensor '{shard.name}' has shape {tuple(whole.get_shape())}, not {shard.global_shape}",
            where=str(path),
            fix="is config.json of the same model?",
        )
    if whole.get_dtype() not in ("F64", "F32", "F16", "BF16"):
        raise ModelError(
            f"tensor '{shard.name}' has type {whole.get_dtype()}",
            where=str(path),
            fix="known: F64, F32, F16, BF16",
        )
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
            folder / _INDEX,
            folder / "config.json",
        ]:
            stale.unlink(missing_ok=True)
        written = _write_weights(tensors, shapes, folder, dtype, file_bytes)
        ends = _ends(end_token, source)
        _write_json(folder / "generation_config.json", {"bos_token_id": start_token, "eos_token_id": ends})
        if tokenizer is not None:
            _copy_tokenizer(tokenizer, folder, start_token, end_token)
        kind = str(written).removeprefix("torch.")
        _write_json(folder / "config.json", config.to_hf(options, kind, start_token, ends))
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
    weight_map: dict[str, str] = {}
    for index, held in enumerate(parts):
        file = _SINGLE if len(parts) == 1 else f"model-{index + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(folder / f"{index}.part", folder / file)
        weight_map |= dict.fromkeys(held, file)
    if len(parts) > 1:
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
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


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _ends(end_token: int | None, source: Path | None) -> int | list[int] | None:
    """The end token, with the others of `source` if it is one of them: else the vocabulary is another."""
    if source is None:
        return end_token
    for name in ("generation_config.json", "config.json"):
        with contextlib.suppress(ModelError):  # whatever became of that folder meanwhile
            known = config.read_json(source / name).get("eos_token_id")
            if isinstance(known, list) and end_token in known:
                return known
    return end_token


def _copy_tokenizer(source: Path, folder: Path, start_token: int | None, end_token: int | None) -> None:
    home = source if source.is_dir() else source.parent
    for name in _TOKENIZER_FILES:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
    if not source.is_dir():
        shutil.copyfile(source, folder / "tokenizer.json")
    if not (folder / "tokenizer_config.json").exists():
        # Without it, transformers would take tokenizer.json for one of Llama's and split text in another way.
        known = Tokenizer.from_file(str(folder / "tokenizer.json"))
        start, end = (None if token is None else known.id_to_token(token) for token in (start_token, end_token))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": end}
        _write_json(folder / "tokenizer_config.json", names)
