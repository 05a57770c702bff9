"""Text <-> tokens: a BPE trained here, single bytes, or any Hugging Face tokenizer; one format of file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Model

from shoal.errors import DataError

END = "<|endoftext|>"
_USUAL_ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

# Words do not cross what this cuts apart. As in GPT-4's (words with one sign before them, up to three
# digits), but made for code: names keep their underscores, and a line's end goes with the signs before it and
# the indentation after it. On Python's standard library, 4096 tokens: 3.85 bytes per token, against 3.47 with
# GPT-4's own.
_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}_]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*"
    r"|\s*[\r\n]+[ \t]*"
    r"|\s+(?!\S)"
    r"|\s+"
)


@dataclass(frozen=True)
class Tokenizer:
    """model: of the `tokenizers` library. start, end: ids of the tokens that documents begin and end with,
    often the same. config: what tokenizer_config.json says.
    """

    model: Model
    start: int
    end: int
    config: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.model.get_vocab(with_added_tokens=True).values())

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text, without special ones: text that looks like one is text."""
        return [encoding.ids for encoding in self.model.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        """The text, special tokens written out."""
        return self.model.decode(tokens, skip_special_tokens=False)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which `transformers.AutoTokenizer` reads too."""
        self.model.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.config,
            "bos_token": self.model.id_to_token(self.start),
            "eos_token": self.model.id_to_token(self.end),
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016, Radford et al. 2019): `vocab_size` tokens at most, with END."""
    model = Model(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), behavior="isolated")
    signs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = pre_tokenizers.Sequence([words, signs])
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(END, special=True)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(texts, trainer)
    return _own(model)


def single_bytes() -> Tokenizer:
    """Token b is byte b, token 256 ends a document."""
    model = Model(models.BPE(vocab={sign: byte for byte, sign in enumerate(_signs())}, merges=[]))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens([AddedToken(END, special=True)])
    return _own(model)


def _own(model: Model) -> Tokenizer:
    """A prompt begins with the token that documents began with in training, here and in transformers."""
    end = model.token_to_id(END)
    model.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, end)])
    return _ready(model, END, END, {})


def load(path: str | Path) -> Tokenizer:
    """A Hugging Face tokenizer: a tokenizer.json, or a folder that holds one. Raises DataError.

    The token that ends a document is the `eos_token` of tokenizer_config.json or special_tokens_map.json, the
    `eos_token_id` of config.json, or a special token with a usual name. The one that begins it is found in
    the same way as `bos_token`; without one it is the end token.
    """
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        fix = "data.tokenizer takes bpe, bytes, or a Hugging Face tokenizer.json or the folder that holds it"
        raise DataError("there is no tokenizer here", where=str(file), fix=fix)
    try:
        model = Model.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        fix = "give a tokenizer.json of the tokenizers library, as transformers' save_pretrained writes it"
        raise DataError(f"cannot read the tokenizer: {error}", where=str(file), fix=fix) from None
    # Some files ask to cut or fill every text to a length.
    model.no_truncation()
    model.no_padding()
    special = {token.content for token in model.get_added_tokens_decoder().values() if token.special}
    end = _edge("eos", file.parent, model) or next((name for name in _USUAL_ENDS if name in special), None)
    if end is None:
        fix = 'put a tokenizer_config.json with {"eos_token": "…"} beside it'
        raise DataError("the tokenizer does not say which token ends a document", where=str(file), fix=fix)
    config = _json(file.parent / "tokenizer_config.json") | _template(file.parent / "chat_template.jinja")
    return _ready(model, _edge("bos", file.parent, model) or end, end, config)


def _ready(model: Model, start: str, end: str, config: dict[str, Any]) -> Tokenizer:
    # What looks like a special token in a text is text.
    model.encode_special_tokens = True
    first, last = model.token_to_id(start), model.token_to_id(end)
    assert first is not None
    assert last is not None
    return Tokenizer(model, first, last, config)


def _signs() -> list[str]:
    """The printable character that stands for each byte (Radford et al. 2019, `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def _edge(which: str, folder: Path, model: Model) -> str | None:
    """The `eos` or `bos` token that the files of a folder name, if the tokenizer has it."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _json(folder / name).get(f"{which}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and model.token_to_id(token) is not None:
            return token
    for name in ("config.json", "generation_config.json"):
        number = _json(folder / name).get(f"{which}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and (token := model.id_to_token(number)) is not None:
            return token
    return None


def _template(path: Path) -> dict[str, str]:
    """The chat template that newer releases of transformers keep in a file of its own."""
    try:
        return {"chat_template": path.read_text(encoding="utf-8")}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="mend or remove this file") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path), fix="mend or remove this file") from None
    return value if isinstance(value, dict) else {}
