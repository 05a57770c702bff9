"""Text of others on a terminal."""

from __future__ import annotations

import pytest

from shoal.observe.screen import visible


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\rb\x9bc", "a\\x0db\\x9bc"),
        ("\u202eevil\u202c", "\\u202eevil\\u202c"),
        ("a\u2066b\u2069", "a\\u2066b\\u2069"),
        ("two\nlines,\ttab", "two\nlines,\ttab"),
        ("שלום\u200f, Grüße, 你好", "שלום\u200f, Grüße, 你好"),
    ],
)
def test_what_a_terminal_would_obey_is_an_escape(text, seen):
    assert visible(text) == seen
