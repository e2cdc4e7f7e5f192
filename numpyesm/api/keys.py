"""`Authorization: Token KEY`: where keys come from, and how they are compared."""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from ..errors import InvalidOption
from .errors import ApiError

ENVIRONMENT = "NUMPYESM_API_KEYS"


class KeyRing:
    """The accepted API keys; if there are none, anyone may use the service."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        # All digests have one length, so the time of a comparison reveals nothing about the length of a key.
        self._digests = [sha256(key.encode()).digest() for key in dict.fromkeys(keys)]

    def __len__(self) -> int:
        return len(self._digests)

    def identify(self, authorization: bytes) -> str | None:
        """Name the key in the header (several are joined by commas), as `key-1`; None if this ring has no keys.

        Raises
        ------
        ApiError
            401 if the header is absent, malformed, or its key unknown.
        """
        if not self._digests:
            return None
        if not authorization:
            raise _refusal("an API key is needed: send the header Authorization: Token KEY")
        scheme, _, key = authorization.strip().partition(b" ")
        if scheme.lower() != b"token" or not key.strip():
            raise _refusal("the Authorization header must be: Token KEY")
        digest = sha256(key.strip()).digest()
        found = 0
        for number, known in enumerate(self._digests, start=1):  # all of them, whichever it is
            found += number * hmac.compare_digest(digest, known)
        if not found:
            raise _refusal("unknown API key")
        return f"key-{found}"


def _refusal(message: str) -> ApiError:
    return ApiError(401, message, headers={"WWW-Authenticate": 'Token realm="numpyesm"'})


def read_keys(path: str | Path | None) -> list[str]:
    """Read keys from a file (one per line, `#` for comments) and from `NUMPYESM_API_KEYS` (split at commas, blanks).

    Raises
    ------
    InvalidOption
        The file cannot be read, or one of the two has no key in it: a service must not be left open by accident.
    """
    keys: list[str] = []
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidOption(f"the API key file {path} cannot be read: {error}") from None
        for number, line in enumerate(text.splitlines(), start=1):
            words = [] if line.lstrip().startswith("#") else line.split()
            if len(words) > 1:
                raise InvalidOption(f"the key in line {number} of {path} has a blank in it; write one key per line")
            keys += words
        if not keys:
            raise InvalidOption(f"there is no key in the API key file {path}")
    if (setting := os.environ.get(ENVIRONMENT)) is not None:
        found = setting.replace(",", " ").split()
        if not found:
            raise InvalidOption(f"{ENVIRONMENT} is set, but there is no key in it")
        keys += found
    return keys
