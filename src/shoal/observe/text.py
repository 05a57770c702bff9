"""What is made with rich, as plain text: for answers that are printed, piped or logged."""

from __future__ import annotations

import io
import shutil

from rich.console import Console, RenderableType


def plain(renderable: RenderableType) -> str:
    """The text without colours, as wide as the terminal; without trailing spaces and lines."""
    console = Console(file=io.StringIO(), width=shutil.get_terminal_size((120, 24)).columns, highlight=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).rstrip()
