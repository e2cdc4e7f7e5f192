"""Files appear whole or not at all; mapped files know when they were overwritten."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from numpyesm.files import MappedFile, atomic_write, file_sha256, overwritten_files, same_file

POSIX = pytest.mark.skipif(os.name != "posix", reason="pipes, links and devices")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    with atomic_write(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt):
        _write_half(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["x.json"]
    assert path.read_bytes() == b"old"
    (tmp_path / "usual").touch()
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    found = [("folder", "it is a folder"), ("file/x.npz", "Not a directory"), ("/dev/full", "No space left on device")]
    for name, why in found[: 2 + os.path.exists("/dev/full")]:
        with (
            pytest.raises(OSError, match=rf"{name} cannot be written \({why}\)"),
            atomic_write(tmp_path / name) as file,
        ):
            file.write(b"x" * 100_000)
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(tmp_path / "y"):
        os.stat(tmp_path / "other")  # an error about another file passes unchanged
    assert not (tmp_path / "y").exists()


@POSIX
def test_pipes_links_and_devices_stay(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    with atomic_write(tmp_path / "pipe") as file:
        file.write(b"through")
    assert reader.communicate()[0] == b"through"
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    (tmp_path / "link").symlink_to("target")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_bytes() == b"new"
    with atomic_write("/dev/null") as file:
        file.write(b"gone")
    assert not Path("/dev/null").is_file()


@POSIX
def test_standard_output_by_its_name(tmp_path: Path) -> None:
    """It is not opened again: that would truncate a redirected file."""
    code = (
        "from numpyesm.files import atomic_write\n"
        "print('before')\n"
        "with atomic_write('/dev/stdout') as file: file.write(b'bytes\\n')\n"
        "print('after')\n"
    )
    with open(tmp_path / "out", "ab") as out:
        subprocess.run([sys.executable, "-c", code], check=True, stdout=out)
    assert (tmp_path / "out").read_bytes() == b"before\nbytes\nafter\n"


def test_overwritten_in_place_and_checksum(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    with open(path, "rb") as file:
        mapped = MappedFile.open(file)
    before = os.stat(path).st_mtime_ns
    for change, overwritten in (
        (lambda: None, False),
        (lambda: path.write_bytes(b"two"), True),
        (lambda: path.rename(tmp_path / "other"), False),
        (lambda: path.write_bytes(b"another"), False),
    ):
        change()
        if path.exists():
            os.utime(path, ns=(before, before + overwritten))
        assert mapped.overwritten == overwritten
        assert overwritten_files([np.frombuffer(mapped, "u1")]) == [str(path)] * overwritten
    assert file_sha256(path, path) == hashlib.sha256(b"another" * 2).hexdigest()
    assert file_sha256(path, start=2) == hashlib.sha256(b"other").hexdigest()
    assert same_file(path, f"{tmp_path}/./weights")
    assert not same_file(path, "x\0")


def _write_half(path: Path) -> None:
    with atomic_write(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
