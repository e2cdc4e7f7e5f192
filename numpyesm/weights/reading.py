"""Reading files that others made: what the system refuses becomes an error that names the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, NumpyesmError, WeightsNotFound

_MAX_JSON = 64 << 20


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
    try:
        with reading(path):
            if path.stat().st_size > _MAX_JSON:
                raise CheckpointError(f"{path} is implausibly large")
            return json.loads(path.read_bytes())
    except NumpyesmError:  # some are ValueErrors too
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON") from error
