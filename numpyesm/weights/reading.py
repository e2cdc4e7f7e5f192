"""Reading files that others made: what the system refuses becomes an error that names the file."""

from __future__ import annotations

import errno
import json
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, NumpyesmError, WeightsNotFound
from ..files import MappedFile

_MAX_JSON = 64 << 20
# Of file systems and sandboxes that cannot map files.
_CANNOT_MAP = {errno.ENODEV, errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP}


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into WeightsNotFound or CheckpointError."""
    try:
        yield
    except NumpyesmError:  # some are OSErrors too
        raise
    except FileNotFoundError as error:
        raise WeightsNotFound(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file of plausible size."""
    with reading(path):
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(f"{path} is implausibly large")
        content = path.read_bytes()
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON") from error


def map_file(path: Path) -> MappedFile | bytes:
    """Map a whole file read-only; read it where files cannot be mapped."""
    with reading(path), open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # cannot be mapped
            raise CheckpointError(f"{path} is empty")
        try:
            return MappedFile.open(file)
        except OSError as error:
            if error.errno not in _CANNOT_MAP:
                raise
            return file.read()


def view_of(
    buffer: mmap.mmap | memoryview | bytes, dtype: np.dtype[Any], count: int = -1, start: int = 0
) -> npt.NDArray[Any]:
    """The numbers in a read-only buffer: a view, or a read-only copy where a writer has not aligned them."""
    values = np.frombuffer(buffer, dtype, count, start)
    if not values.flags.aligned:
        values = values.copy()
        values.flags.writeable = False
    return values
