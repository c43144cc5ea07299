"""What a reader of checkpoints says when it cannot go on."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used. One line: the file, what was found in it, what to do."""


def shorten(name: object, limit: int = 80) -> str:
    """`name` in one printable line of at most `limit` characters; its head and its tail are kept.

    Names come out of files: they may have 10,000 characters, line feeds or terminal escapes.
    """
    shown = _cut(str(name), limit)  # first, so that the escaping below costs little
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)
    return _cut(shown, limit)


def _cut(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = (limit - 3) // 2
    return f"{text[: limit - 3 - tail]}...{text[len(text) - tail :]}"
