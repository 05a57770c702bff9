"""Text that a model has written, for a terminal, which would obey the control characters in it."""

from __future__ import annotations

import re
from typing import TextIO

# C0 without tab and newline, DEL, and C1, of which some terminals take U+009B for the beginning of a command.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    r"""With control characters as escapes, `\x1b`; newlines and tabs stay."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def shown(text: str, stream: TextIO) -> str:
    """What to print of it: `visible` on a terminal, the text as it is into a file or pipe."""
    return visible(text) if stream.isatty() else text
