"""The names of models in addresses; by itself, for the Lambda handler, which does without the service's packages."""

from __future__ import annotations

import re

from ..errors import InvalidOption

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = {"schema", "models"}


def check_slug(slug: str) -> str:
    """A slug that can stand in a path, or InvalidOption."""
    if not _SLUG.fullmatch(slug) or slug in _RESERVED:
        raise InvalidOption(
            f"{slug[:80]!r} cannot be a model's slug: lower-case letters, digits, dot, dash and underscore, "
            f"and neither {' nor '.join(sorted(_RESERVED))}"
        )
    return slug
