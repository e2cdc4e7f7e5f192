"""The models that are served, by slug."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .._version import __version__
from ..config import MAX_RESIDUES
from ..errors import InvalidOption
from ..model import ESM2
from ..weights.checkpoint import Checkpoint
from .errors import ApiError
from .schemas import MAX_ITEMS, REQUESTS
from .slugs import check_slug


@dataclass(frozen=True)
class ServedModel:
    """A model under its slug."""

    slug: str
    model: ESM2

    @property
    def checkpoint(self) -> Checkpoint:
        return self.model.checkpoint

    @property
    def actions(self) -> tuple[str, ...]:
        """What the weights can do: without an LM head there are embeddings only."""
        return tuple(action for action in REQUESTS if action == "encode" or self.checkpoint.has_lm_head)

    def describe(self) -> dict[str, Any]:
        """For `GET /api/v3/models/`."""
        config = self.model.config
        return {
            "slug": self.slug,
            "name": self.model.name,
            "layers": config.num_layers,
            "width": config.embed_dim,
            "heads": config.num_heads,
            "max_length": MAX_RESIDUES,
            "max_items": MAX_ITEMS,
            "actions": list(self.actions),
            "contacts": self.checkpoint.has_contact_head,
            "synthetic": self.checkpoint.synthetic,
            # Only of random weights: another's may be a path on this machine.
            "source": self.checkpoint.source if self.checkpoint.synthetic else None,
            "precision": self.model.precision,
            "backend": self.model.backend,
            "version": __version__,
        }


class Catalog:
    """All served models."""

    def __init__(self, models: Mapping[str, ESM2]) -> None:
        if not models:
            raise InvalidOption("no model to serve")
        self._models = {check_slug(slug): ServedModel(slug, model) for slug, model in models.items()}

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    @property
    def slugs(self) -> list[str]:
        """All slugs."""
        return list(self._models)

    def find(self, slug: str, action: str) -> ServedModel:
        """The model of `slug`, which can do `action`, or ApiError 404 that says what there is."""
        served = self._models.get(slug)
        if served is None:
            raise ApiError(404, f"there is no model {slug[:80]!r} here; there are {', '.join(self._models)}")
        if action not in served.actions:
            reason = ": its weights have no LM head" if action in REQUESTS else ""
            raise ApiError(404, f"{slug} has no action {action[:80]!r}{reason}; it has {', '.join(served.actions)}")
        return served
