"""Make text from other people's files safe for messages and terminals."""

from __future__ import annotations

from collections.abc import Iterable


def printable(text: str) -> str:
    """Replace control characters and lone surrogates with escapes such as `\\x1b`; keep line ends and tabs.

    A terminal obeys control characters, so they could hide or forge what is printed.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def quoted(value: object, limit: int = 80) -> str:
    """Quote a text or a number from a file, in at most `limit` characters; of anything else, name the type."""
    if isinstance(value, str):
        text = repr(value[: limit + 1])
    else:
        text = repr(value) if isinstance(value, int) else type(value).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def listed(names: Iterable[str], most: int = 6) -> str:
    """List names, each cut to 80 characters; of more than `most`, the first ones and how many more there are."""
    names = [name[:80] for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def in_words(error: Exception) -> str:
    """Return the message of an error, without Python's `[Errno 28]`."""
    if type(error).__str__ is OSError.__str__ and isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return f"standard output or an open file cannot be used ({error.strerror})"
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
