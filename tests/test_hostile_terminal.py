"""What a terminal gets: nothing that it would obey, and nothing at all where nobody listens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from numpyesm.printable import printable, quoted

FULL = "numpyesm: error: standard output or an open file cannot be used (No space left on device)\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("protéine α 🧬\n\t1", "protéine α 🧬\n\t1"),
        ("\x1b[31mred\x07\r", r"\x1b[31mred\x07\r"),
        ("\x9b2J\x00\u202e", r"\x9b2J\x00\u202e"),
        ("half \ud83e of a pair", r"half \ud83e of a pair"),
    ],
)
def test_control_characters_become_escapes(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_quoted_values_are_short() -> None:
    assert quoted("a\x1bb") == r"'a\x1bb'"
    assert quoted("x" * 10_000_000) == "'" + "x" * 76 + "..."
    assert quoted([["deep"]]) == "list"


@pytest.mark.skipif(sys.platform != "linux", reason="shells and /dev/full")
@pytest.mark.parametrize(
    ("redirection", "said", "code"),
    [
        (">&-", None, 0),
        ("2>&-", None, 0),
        (">&- 2>&-", "", 0),
        ("> /dev/full", FULL, 1),
    ],
)
def test_closed_and_full_streams(redirection: str, said: str | None, code: int, tmp_path: Path) -> None:
    command = f'"{sys.executable}" -m numpyesm info {redirection}'
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert said in (None, done.stderr)
