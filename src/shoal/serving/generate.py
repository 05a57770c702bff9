"""Text from a model, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from shoal.errors import ModelError
from shoal.job.check import at_least, require
from shoal.job.model import ModelOptions
from shoal.models.decoder import Decoder
from shoal.serving.cache import Cache
from shoal.serving.load import load
from shoal.serving.sampler import Sampling, draw
from shoal.serving.source import home_of
from shoal.serving.text import PromptTokenizer, Stream, load_tokenizer


def generate(
    model: Decoder | str | Path,
    prompt: str = "",
    *,
    tokenizer: PromptTokenizer | str | Path | None = None,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_text: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> str:
    """What the model writes after `prompt`, without the prompt.

    model: run folder, folder in Hugging Face's format, or a model that `shoal.load` returned; with a model,
    give `tokenizer` too (a folder that has one, or what `load_tokenizer` returned). An empty prompt begins a
    new text. Ends with a token that ends a text, after `max_tokens` tokens, or where the model's context is
    full. temperature, top_k, top_p: see `Sampling`; the same seed gives the same text on the same machine.
    on_text: gets each piece of text as soon as its characters are whole. say: gets a notice if the context
    ended it.

    Raises ModelError (no such folder, prompt longer than the context), DataError (no tokenizer) and JobError
    (an option out of range).
    """
    sampling = Sampling(temperature, top_k, top_p)
    sampling.validate()
    at_least("max_tokens", max_tokens, 1)
    require(0 <= seed < 2**64, f"seed={seed} is not in [0, 2**64)", "any other number")
    if tokenizer is None:
        if isinstance(model, Decoder):
            raise ModelError("a model alone has no tokenizer", fix="give tokenizer=folder, or the folder as model")
        tokenizer = home_of(model)
    if not isinstance(tokenizer, PromptTokenizer):
        tokenizer = load_tokenizer(tokenizer)
    if not isinstance(model, Decoder):
        model = load(model)
    known = model

    def drawn(start: list[int], count: int) -> Iterator[int]:
        return tokens(known, start, count, sampling, seed)

    return written(drawn, model.options, tokenizer, prompt, max_tokens, on_text, say)


def written(
    drawn: Callable[[list[int], int], Iterator[int]],
    options: ModelOptions,
    tokenizer: PromptTokenizer,
    prompt: str,
    max_tokens: int,
    on_text: Callable[[str], None] | None,
    say: Callable[[str], None] | None,
) -> str:
    """The text of the tokens that `drawn` gives; otherwise as `generate`.

    drawn: (tokens of the prompt, how many) -> the next ones, of which no more are taken than the text has.
    """
    start, count = _checked(options, tokenizer, prompt, max_tokens)
    stream = Stream(tokenizer, start, on_text)
    ended = False
    for token in drawn(start, count):
        if ended := token in tokenizer.ends:
            break
        stream.add(token)
    if not ended and max_tokens > count and say is not None:
        say(f"stopped: the model's context of {options.max_position_embeddings} tokens is full")
    return stream.end()


def _checked(options: ModelOptions, tokenizer: PromptTokenizer, prompt: str, max_tokens: int) -> tuple[list[int], int]:
    """(tokens of the prompt, how many may follow). Raises ModelError where the model cannot go on from it."""
    start, context = tokenizer.encode(prompt), options.max_position_embeddings
    if len(start) >= context:
        raise ModelError(
            f"the prompt has {len(start)} tokens and the model's context {context}", fix="shorten the prompt"
        )
    if max(start) >= options.vocab_size:
        raise ModelError(
            f"the tokenizer gives token {max(start)}, the model knows {options.vocab_size}",
            fix="give the tokenizer that the model was trained with",
        )
    return start, min(max_tokens, context - len(start))


@torch.no_grad()
def tokens(model: Decoder, prompt: list[int], count: int, sampling: Sampling, seed: int) -> Iterator[int]:
    """The next `count` tokens after `prompt`, drawn one by one; the caller may stop earlier."""
    weight = model.model.embed_tokens.weight
    cache = Cache(model.options, 1, len(prompt) + count, weight.dtype, weight.device)
    generator = torch.Generator().manual_seed(seed)
    new_BL = torch.tensor([prompt], device=weight.device)
    for _ in range(count):
        position_BL = torch.arange(cache.length, cache.length + new_BL.shape[1], device=weight.device)[None]
        logits_BV = model(new_BL, position_BL, cache.attend, last_logits)
        cache.advance(new_BL.shape[1])
        new_BL = draw(logits_BV, sampling, generator)[:, None]
        yield int(new_BL)


def last_logits(hidden_BLD: Tensor, weight_VD: Tensor) -> Tensor:
    """(B, V): of the last position only, since a long prompt times a large vocabulary is much memory."""
    return hidden_BLD[:, -1] @ weight_VD.T
