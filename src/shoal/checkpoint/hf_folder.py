"""What stands in a Hugging Face folder beside the numbers: which file holds which tensor, config, tokenizer.

Without torch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer

from shoal.checkpoint.safetensors import read_header
from shoal.errors import ModelError
from shoal.job.model import ModelOptions
from shoal.models import config
from shoal.models.spec import ParameterSpec, parameters

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip
DTYPES = ("F64", "F32", "F16", "BF16")
# Derived or doubled tensors that published folders hold, and that a model does without.
_DERIVED = ("rotary_emb.inv_freq", "masked_bias")


def files(folder: Path) -> dict[str, str]:
    """Tensor name -> file that holds it. Raises ModelError."""
    if (folder / INDEX).exists():
        named = config.read_json(folder / INDEX).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise ModelError("has no weight_map", where=str(folder / INDEX), fix="fetch the file again")
        return named
    if (folder / SINGLE).exists():
        return dict.fromkeys(read_header(folder / SINGLE), SINGLE)
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    raise ModelError(
        f"there is no {SINGLE}" + (f", only {pickled[0]}, which could run code when loaded" if pickled else ""),
        where=str(folder),
        fix="save the model with transformers' save_pretrained, which writes safetensors",
    )


class Weights(NamedTuple):
    """The weights of a folder: what each is, which file holds it, and how they are stored."""

    specs: dict[str, ParameterSpec]
    files: dict[str, str]
    storage: config.Storage


def weights(folder: Path, say: Callable[[str], None] = lambda line: None) -> Weights:
    """What the folder holds. say: is told what of it is left out.

    Raises ModelError for a config.json or an index that cannot be used, and for tensors that config.json does not
    account for: weights that would be left out in silence make another model than the one in the folder.
    """
    options = config.read(folder)
    storage = config.storage(config.read_json(folder / "config.json"), str(folder / "config.json"))
    found = Weights(parameters(options), files(folder), storage)
    further = tuple(f"model.layers.{layer}." for layer in storage.further)
    left = [name for name in found.files if name.startswith(further)]
    if left:
        say(f"left out: {len(left)} tensors of the multi-token-prediction layer{'s' * (len(further) > 1)}")
    _refuse_strangers(folder, set(found.files) - set(left), found, options.tie_word_embeddings)
    return found


def _refuse_strangers(folder: Path, names: Iterable[str], of: Weights, tied: bool) -> None:
    known = {*of.specs, "lm_head.weight"} if tied else set(of.specs)
    if of.storage.block:
        known |= {f"{name}_scale_inv" for name in of.specs if name.endswith(".weight")}
    strangers = sorted(name for name in names if name not in known and not name.endswith(_DERIVED))
    if strangers:
        raise ModelError(
            f"{len(strangers)} tensors are more than its config.json accounts for, e.g. '{strangers[0]}'",
            where=str(folder),
            fix="is config.json of the same model? (biases: attention_bias, mlp_bias)",
        )


def missing(folder: Path, name: str) -> ModelError:
    return ModelError(f"tensor '{name}' is in none of its files", where=str(folder), fix="fetch the folder again")


def check(
    path: Path,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
    known: tuple[str, ...] = DTYPES,
) -> None:
    """Raises ModelError unless the tensor has the expected shape, and numbers of a type that is known."""
    if shape != expected:
        raise ModelError(
            f"tensor '{name}' has shape {shape}, not {expected}",
            where=str(path),
            fix="is config.json of the same model?",
        )
    if dtype not in known:
        raise ModelError(f"tensor '{name}' has type {dtype}", where=str(path), fix=f"known: {', '.join(known)}")


def file_name(index: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, files: list[list[str]], size: int) -> None:
    """The index of a folder with several files. files: names of the tensors in each. size: of all, in bytes."""
    if len(files) > 1:
        weight_map = {name: file_name(i, len(files)) for i, names in enumerate(files) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_words(
    folder: Path,
    options: ModelOptions,
    dtype: str,
    *,
    tokenizer: Path | None,
    start_token: int | None,
    end_token: int | None,
    source: Path | None,
) -> None:
    """All but weights. config.json is written last: a folder that has one is whole. Arguments: see `export`."""
    ends = _ends(end_token, source)
    write_json(folder / GENERATION, {"bos_token_id": start_token, "eos_token_id": ends})
    if tokenizer is not None:
        _copy_tokenizer(tokenizer, folder, start_token, end_token)
    write_json(folder / "config.json", config.to_hf(options, dtype, start_token, ends))


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _ends(end_token: int | None, source: Path | None) -> int | list[int] | None:
    """The end token, with the others of `source` if it is one of them: else the vocabulary is another."""
    if source is None:
        return end_token
    for name in (GENERATION, "config.json"):
        with contextlib.suppress(ModelError):  # whatever became of that folder meanwhile
            known = config.read_json(source / name).get("eos_token_id")
            if isinstance(known, list) and end_token in known:
                return known
    return end_token


def _copy_tokenizer(source: Path, folder: Path, start_token: int | None, end_token: int | None) -> None:
    home = source if source.is_dir() else source.parent
    for name in TOKENIZER_FILES:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
    if not source.is_dir():
        shutil.copyfile(source, folder / "tokenizer.json")
    if not (folder / "tokenizer_config.json").exists():
        # Without it, transformers would take tokenizer.json for one of Llama's and split text in another way.
        known = Tokenizer.from_file(str(folder / "tokenizer.json"))
        start, end = (None if token is None else known.id_to_token(token) for token in (start_token, end_token))
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": end}
        write_json(folder / "tokenizer_config.json", names)
