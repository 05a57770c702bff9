"""Small corpora on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from shoal.data.append import Appended, append
from shoal.data.prepare import Prepared, prepare
from shoal.job.data import DataOptions


def words(count: int, seed: int) -> str:
    """Lines of made-up code, no two alike."""
    rng = random.Random(seed)
    names = ["alpha", "beta", "gamma_delta", "self.x", "return", "def f():", "    if", "é", "中文", "😀"]
    lines: list[str] = []
    while count > 0:
        lines.append(" ".join(rng.choices(names, k=6)) + f" = {rng.randrange(10**6)}")
        count -= len(lines[-1])
    return "\n".join(lines) + "\n"


def folder(root: Path, files: int = 12, size: int = 1500) -> Path:
    """A folder of text files, some in a folder below, each with lines of its own."""
    (root / "below").mkdir(parents=True)
    for number in range(files):
        path = root / ("below" if number % 3 == 0 else ".") / f"file{number:02}.py"
        path.write_text(f"# file {number}\n" + words(size + 211 * number, number), encoding="utf-8")
    return root


def jsonl(path: Path, documents: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: d, "id": i}) + "\n" for i, d in enumerate(documents)))
    return path


def quiet(options: DataOptions, seed: int = 0) -> Prepared:
    return prepare(options, seed, lambda text: None)


def appended(store: Path, documents: list[str], **options: Any) -> Appended:
    """Appends these documents to a growing store, which is made if it is not there; a byte is a token."""
    path = jsonl(store.with_name(f"text{len(list(store.parent.iterdir()))}.jsonl"), documents)
    asked = {"tokenizer": "bytes", "validation": 0.0, **options}
    return append(store, DataOptions(source=(str(path),), **asked), (), lambda text: None)
