"""The model of a published row: sizes as printed; of models with experts, known by name, what is not printed."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping

from shoal.planning import shapes
from shoal.planning.shapes import Shape

Row = Mapping[str, str]

_GATED = ("llama", "mistral", "mixtral", "qwen", "deepseek", "gemma")


def number(row: Row, name: str) -> float:
    """NaN where it is empty, or no number."""
    try:
        return float(row.get(name, "").replace(",", ""))
    except ValueError:
        return math.nan


def either(value: float, other: float) -> float:
    return other if math.isnan(value) else value


def columns(row: Row) -> dict[str, float] | str:
    """By the names of `work.MODEL`; or why the row is skipped."""
    name = row.get("model", "").lower()
    known = routed(name)
    if known is not None:
        return _routed(row, known)
    if number(row, "ep") > 1 or re.search(r"\bmoe\b|\d+x\d+b|-a\d+b", name):
        return "experts, of a model that is not known"
    hidden = number(row, "hidden")
    heads = either(number(row, "heads"), float(round(hidden / 128)))
    return {
        "layers": number(row, "layers"), "hidden": hidden, "heads": heads, "head_size": hidden / heads,
        "key_heads": either(number(row, "kv_heads"), heads), "gated": float(any(family in name for family in _GATED)),
        "feed": either(number(row, "ffn"), 4 * hidden), "sequence": number(row, "seq_len"),
        "vocab": either(number(row, "vocab"), 250_880.0 if "bloom" in name else 51_200.0),
    }  # fmt: skip


def routed(name: str) -> Shape | None:
    """The model with experts that is meant, of those that planning knows; None where none is."""
    plain = _plain(name)
    found = [spelled for spelled in _routed_names() if spelled in plain]
    return _routed_names()[max(found, key=len)] if found else None


@functools.cache
def _routed_names() -> Mapping[str, Shape]:
    """Plain spellings, without what is active of each token: Qwen3-30B is Qwen3-30B-A3B."""
    found = {}
    for name, table in shapes.tables().items():
        shape = shapes.named(name)
        if shape.experts:
            for one in (name, *table.get("also", ())):
                found[_plain(re.sub(r"-a\d+b$", "", one))] = shape
    return found


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9.]", "", text.lower())


def _routed(row: Row, known: Shape) -> dict[str, float] | str:
    """Layers, length and vocabulary as printed: tables have models that are cut."""
    layers = number(row, "layers")
    if number(row, "hidden") != known.hidden:
        return f"hidden is not that of {known.name}"
    return known.columns | {
        "layers": layers, "sequence": number(row, "seq_len"), "vocab": either(number(row, "vocab"), float(known.vocab)),
        "dense_layers": min(float(known.dense_layers), layers),
        "expert": max(1.0, either(number(row, "ep"), 1.0)),
    }  # fmt: skip
