"""`shoal.generate`: text from a model, in this process or with its blocks on several local ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import JobError, LayoutError
from shoal.job import Layout
from shoal.job.check import at_least, require

if TYPE_CHECKING:
    from shoal.models.decoder import Decoder
    from shoal.serving.text import PromptTokenizer


def generate(
    model: Decoder | str | Path,
    prompt: str = "",
    *,
    tokenizer: PromptTokenizer | str | Path | None = None,
    layout: str = "",
    on_text: Callable[[str], None] | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> str:
    """As `shoal.serving.generate.generate`, which says what the options are.

    layout: e.g. `pipeline=2` spreads the model's blocks over as many local ranks, of which none holds the whole; it is
    then a folder, and the text is printed as it comes. Empty = in this process. Raises LayoutError for other axes.
    """
    if not layout or Layout.parse(layout).world == 1:
        from shoal.serving.generate import generate as here

        return here(model, prompt, tokenizer=tokenizer, on_text=on_text, say=say, **options)
    parsed = Layout.parse(layout)
    if parsed.world != parsed.pipeline or parsed.stages_per_rank > 1:
        raise LayoutError(f"generating in layout {parsed} is not built", fix="layout=pipeline=N with schedule=1f1b")
    if not isinstance(model, str | Path) or not isinstance(tokenizer, str | Path | None):
        raise JobError("ranks cannot be given a model or tokenizer in memory", fix="give their folders")
    from shoal.launch import local
    from shoal.serving.sampler import Sampling

    draws = {name: options.pop(name, default) for name, default in vars(Sampling(0.8, 0, 1.0)).items()}
    Sampling(**draws).validate()
    seed, most = options.pop("seed", 0), options.pop("max_tokens", 128)
    at_least("max_tokens", most, 1)
    require(0 <= seed < 2**64, f"seed={seed} is not in [0, 2**64)", "any other number")
    if options:
        raise TypeError(f"unknown options {sorted(options)}")
    folder = os.path.abspath(model)
    arguments = {
        "model": folder, "tokenizer": os.path.abspath(tokenizer or _home(folder)), "prompt": prompt,
        "max_tokens": most, "seed": seed, "layout": str(parsed), **draws,
    }  # fmt: skip
    return local.run("shoal.serving.staged:main", arguments, parsed.world)


def _home(folder: str) -> Path:
    from shoal.serving.load import home_of

    return home_of(folder)
