"""`shoal.generate`: text from a model, in this process or with its blocks and matrices on several local ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.errors import JobError, LayoutError
from shoal.job import Layout
from shoal.job.check import at_least, require
from shoal.job.fits import check_stages, check_tensor
from shoal.job.nearby import or_nearest

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

    layout: e.g. `pipeline=2,schedule=zbv` or `tensor=2`, or both, as in training: so many local ranks have the model
    between them, and none holds the whole; it is then a folder, and the text is printed as it comes. What a layout says
    besides of how to train is passed over. Empty = in this process. Raises LayoutError for other axes, and where the
    model cannot be shared so.
    """
    parsed = Layout.parse(layout) if layout else Layout()
    if parsed.world == 1:
        from shoal.serving.generate import generate as here

        return here(model, prompt, tokenizer=tokenizer, on_text=on_text, say=say, **options)
    _refuse_other_axes(parsed)
    if not isinstance(model, str | Path) or not isinstance(tokenizer, str | Path | None):
        raise JobError("ranks cannot be given a model or tokenizer in memory", fix="give their folders")
    from shoal.launch import local
    from shoal.serving.sampler import Sampling
    from shoal.serving.source import find, home_of

    draws = {name: options.pop(name, default) for name, default in vars(Sampling(0.8, 0, 1.0)).items()}
    Sampling(**draws).validate()
    seed, most = options.pop("seed", 0), options.pop("max_tokens", 128)
    at_least("max_tokens", most, 1)
    require(0 <= seed < 2**64, f"seed={seed} is not in [0, 2**64)", "any other number")
    if options:
        raise TypeError(f"unknown options {sorted(options)}")
    source = find(model)
    shares = (partial(check_tensor, source.options), partial(check_stages, source.options))
    for first, other in (shares, shares[::-1]):
        or_nearest(parsed, first, other, _refuse_other_axes)
    arguments = {
        "folder": os.path.abspath(source.folder), "options": asdict(source.options),
        "tokenizer": os.path.abspath(tokenizer or home_of(model)), "prompt": prompt,
        "max_tokens": most, "seed": seed, "layout": str(parsed), **draws,
    }  # fmt: skip
    return local.run("shoal.serving.staged:main", arguments, parsed.world)


def _refuse_other_axes(layout: Layout) -> None:
    """All but pipeline and tensor."""
    other = [f"{name}={n}" for name in ("replicas", "fsdp", "context", "expert") if (n := getattr(layout, name)) > 1]
    if not other:
        return
    nearest = Layout(pipeline=layout.pipeline, tensor=layout.tensor, schedule=layout.schedule, stages=layout.stages)
    fix = f"layout={nearest}"
    if nearest.world == 1:
        fix = f"layout=pipeline={layout.sharers}, or leave it out" if layout.sharers > 1 else "leave it out"
    raise LayoutError(
        f"layout {layout} cannot generate: pipeline and tensor share out what one token takes, not {', '.join(other)}",
        fix=fix,
    )
