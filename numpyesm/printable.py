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


def quoted(value: object) -> str:
    """Quote a text or a number from a file, in at most 80 characters; of anything else, name the type."""
    if isinstance(value, str):
        text = repr(value[:81])
    else:
        text = repr(value) if isinstance(value, int) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def listed(names: Iterable[str]) -> str:
    """List names, each cut to 80 characters; of more than six, the first six and how many more there are."""
    names = [name[:80] for name in names]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def in_words(error: Exception) -> str:
    """Return the message of an error, without Python's `[Errno 28]`."""
    if type(error).__str__ is OSError.__str__ and isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return f"standard output or an open file cannot be used ({error.strerror})"
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
