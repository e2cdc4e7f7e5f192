"""Make text from other people's files safe for messages and terminals."""

from __future__ import annotations


def printable(text: str) -> str:
    """Replace what is not text (control characters, halves of surrogate pairs) by its escape, such as `\\x1b`.

    Line ends and tabs stay. A terminal obeys control characters: one could hide or forge what is printed.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def quoted(value: object, limit: int = 80) -> str:
    """A value from a file in quotes, without control characters, and cut to at most `limit` characters."""
    text = repr(value[: limit + 1] if isinstance(value, str) else value) if isinstance(value, str | int) else ""
    text = text or type(value).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def in_words(error: Exception) -> str:
    """Return the message of an error, without Python's `[Errno 28]`."""
    if type(error).__str__ is OSError.__str__ and isinstance(error, OSError) and error.strerror:
        if error.filename is None:
            return f"standard output or an open file cannot be used ({error.strerror})"
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__
