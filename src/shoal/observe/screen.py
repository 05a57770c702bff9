"""Text that a model or a peer has written, for a terminal, which would obey the control characters in it."""

from __future__ import annotations

import re
from typing import TextIO

# C0 without tab and newline, DEL, and C1, of which some terminals take U+009B for the beginning of a command. And what
# shows other text, behind it too, in another order than it has (Boucher and Anderson 2023, "Trojan Source: Invisible
# Vulnerabilities", section 3): embeddings, overrides, isolates. Marks stay: Hebrew and Arabic are written with them.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""With control characters as escapes, `\x1b` and `\u202e`; newlines and tabs stay."""
    return _CONTROLS.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shown(text: str, stream: TextIO) -> str:
    """What to print of it: `visible` on a terminal, the text as it is into a file or pipe."""
    return visible(text) if stream.isatty() else text
