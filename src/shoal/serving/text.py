"""A prompt to tokens, and new tokens to text, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from shoal.data import tokenizer
from shoal.errors import ModelError
from shoal.models.config import read_json


@dataclass(frozen=True)
class PromptTokenizer:
    """model: of the `tokenizers` library. start: begins a new text. ends: any of these tokens ends one."""

    model: tokenizers.Tokenizer
    start: int
    ends: frozenset[int]

    def encode(self, prompt: str) -> list[int]:
        """With what the tokenizer puts around a text, such as Llama's <s>; at least the start token."""
        return self.model.encode(prompt).ids or [self.start]

    def decode(self, tokens: list[int]) -> str:
        """The text, special tokens written out."""
        return self.model.decode(tokens, skip_special_tokens=False)


def load_tokenizer(path: str | Path) -> PromptTokenizer:
    """From a run folder, a Hugging Face folder or a tokenizer.json. Raises ModelError or DataError."""
    path = Path(path)
    if not path.exists():
        fix = "give a run folder or a Hugging Face folder"
        raise ModelError("there is no such folder", where=str(path), fix=fix)
    known = tokenizer.load(path)
    ends = {known.end}
    home = path if path.is_dir() else path.parent
    # A finished run says it in its model/.
    for file in (
        place / name for place in (home, home / "model") for name in ("config.json", "generation_config.json")
    ):
        said = read_json(file).get("eos_token_id") if file.is_file() else None
        ends |= set(said if isinstance(said, list) else [] if said is None else [said])
    return PromptTokenizer(known.model, known.start, frozenset(ends))


class Stream:
    """Turns tokens into text as they come. A character that several tokens make up comes out whole."""

    def __init__(self, tokenizer: PromptTokenizer, prompt: list[int], on_text: Callable[[str], None] | None = None):
        """prompt: decoded with the first tokens, since some tokenizers treat a text's first word
        differently."""
        self.tokenizer, self.on_text = tokenizer, on_text
        self.text = ""
        # Two places in `tokens`: text before `said` is out; decoding begins a little earlier, at `anchor`.
        self.tokens, self.anchor, self.said = prompt[-8:], 0, len(prompt[-8:])

    def add(self, token: int) -> None:
        self.tokens.append(token)
        piece = self._unsaid()
        # An unfinished character decodes as U+FFFD, until the tokens of its other bytes are there.
        if piece and not piece.endswith("\ufffd"):
            self._say(piece)
            self.anchor, self.said = self.said, len(self.tokens)

    def end(self) -> str:
        """All the text; a character that stayed unfinished as U+FFFD."""
        if piece := self._unsaid():
            self._say(piece)
        return self.text

    def _unsaid(self) -> str:
        before = self.tokenizer.decode(self.tokens[self.anchor : self.said])
        return self.tokenizer.decode(self.tokens[self.anchor :])[len(before) :]

    def _say(self, piece: str) -> None:
        self.text += piece
        if self.on_text is not None:
            self.on_text(piece)
