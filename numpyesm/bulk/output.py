"""The output of a run and its list of rejected records: what exists, and how it is replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import BulkError, InvalidOption
from ..files import atomic_write, same_file, sync_folder
from .reader import Item
from .writers import ENDINGS, output_format, tsv_line, writer_of
from .writers.folder import is_ours

_REJECTED_HEADER = tsv_line("record", "id", "description", "length", "reason")


class Output:
    """A file or folder that a run makes; InvalidOption if it cannot be an output, such as one of the inputs.

    A symbolic link stays: what it points to is replaced.
    """

    def __init__(self, output: str | os.PathLike[str], inputs: Sequence[str | os.PathLike[str]]) -> None:
        self.form = output_format(os.fspath(output))
        self.writer = writer_of(self.form)
        path = Path(output)
        if path.name in ("", ".."):  # "." and the like are folders as well: find their name
            path = Path(os.path.abspath(path))
            if not path.name:
                raise InvalidOption(f"output {os.fspath(output)!r}: expected a file or a folder of its own")
        self.path = path.resolve() if path.is_symlink() else path
        if any(os.fspath(name) != "-" and same_file(name, self.path) for name in inputs):
            raise InvalidOption(f"output {self.path} is the input itself: choose another output")
        if os.path.ismount(self.path):
            raise InvalidOption(
                f"output {self.path} is a mount point, which cannot be replaced as a whole: "
                f"name a folder in it, {self.path / 'embeddings'}/"
            )
        self.about = self._read_about()
        self.rejected_file, self._replaces_list = self._find_list()

    def _read_about(self) -> dict[str, Any] | None:
        """Metadata of the output, if it is there; {} if it is not ours."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return None
        try:
            about = self.writer.metadata(self.path)
        except (OSError, KeyError, ValueError, TypeError):
            return {}
        return about if isinstance(about, dict) else {}

    def _find_list(self) -> tuple[Path, bool]:
        """Return the path of the list of rejected records, and whether it belongs to the existing output.

        `OUT.rejected.tsv`; with the form in its name if another output of that stem lies beside it.
        """
        named = (self.about or {}).get("rejected_file")
        if isinstance(named, str) and named and Path(named).name == named:
            return self.path.with_name(named), True
        stem = self.path.name if self.form == "folder" else self.path.stem
        others = {stem, *(stem + ending for ending in ENDINGS)} - {self.path.name}
        alone = not any(self.path.with_name(name).exists() for name in others)
        ending = "" if alone else self.path.suffix if self.form != "folder" else ".folder"
        return self.path.with_name(f"{stem}{ending}.rejected.tsv"), False

    def check_replaceable(self) -> None:
        """Raise BulkError if the output may not be replaced: a folder goes with all that is in it."""
        if self.about is None or not self.path.is_dir():
            return
        others = [entry.name for entry in self.path.iterdir() if not is_ours(entry)]
        if others or not self.about:
            what = f"holds other files ({others[0]})" if others else "was not made by numpyesm embed"
            raise BulkError(f"{self.path} {what}: --overwrite does not replace it, remove it yourself")

    def replace(self, made: Path, folder: Path) -> None:
        """Put `made` in place of what is there; `folder` is on the same file system and takes what was there."""
        if self.path.is_dir() and any(self.path.iterdir()):
            # A folder that is not empty cannot be replaced at once.
            replaced = folder / "replaced"
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(self.path, replaced)
        os.replace(made, self.path)
        sync_folder(self.path.parent)

    def write_rejected(self, rejected: Iterable[Item]) -> None:
        """Write the list of rejected records."""
        with atomic_write(self.rejected_file) as file:
            file.write(_REJECTED_HEADER.encode())
            for item in rejected:
                file.write(tsv_line(item.position, item.id, item.description, item.length, item.reason).encode())

    def remove_rejected(self) -> None:
        """Remove the list of an earlier run on this output, but only what we wrote."""
        if self._replaces_list and self.rejected_file.is_file():
            with open(self.rejected_file, "rb") as old:
                ours = old.readline() == _REJECTED_HEADER.encode()
            if ours:
                self.rejected_file.unlink()
