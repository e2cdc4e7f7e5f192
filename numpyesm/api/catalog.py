"""The models that are served: their names in addresses, their actions, their descriptions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .._version import __version__
from ..config import MAX_RESIDUES
from ..errors import InvalidOption
from ..model import ESM2
from ..options import missing_head
from ..weights.checkpoint import Checkpoint
from .errors import ApiError

ACTIONS = ("encode", "predict", "log_prob", "classify")
# Items of one request, as in the hosted API.
MAX_ITEMS = 8

_SLUG = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = ("models", "schema")


def check_slug(slug: str) -> str:
    """Return the slug, or raise InvalidOption if it cannot be part of a path."""
    if not _SLUG.fullmatch(slug) or slug in _RESERVED:
        raise InvalidOption(
            f"{slug[:80]!r} cannot be a model's slug, as in SLUG=WEIGHTS: expected lower-case letters, digits, dots, "
            f"dashes and underscores, and neither of {' and '.join(_RESERVED)}, which are reserved"
        )
    return slug


@dataclass(frozen=True)
class ServedModel:
    """A model and its slug."""

    slug: str
    model: ESM2

    @property
    def checkpoint(self) -> Checkpoint:
        """The model's weights."""
        return self.model.checkpoint

    @property
    def actions(self) -> list[str]:
        """Actions for which the weights have the heads; embeddings need none."""
        return [action for action in ACTIONS if missing_head(self.checkpoint, action) is None]

    @property
    def headers(self) -> dict[str, str]:
        """Headers of answers that this model computed."""
        return {"x-numpyesm-weights": "synthetic: these numbers mean nothing"} if self.checkpoint.synthetic else {}

    def describe(self) -> dict[str, Any]:
        """Describe the model, also in the words that the `biolmai` SDK looks for."""
        config = self.model.config
        return {
            "slug": self.slug,
            "name": self.model.name,
            "layers": config.num_layers,
            "width": config.embed_dim,
            "heads": config.num_heads,
            "max_length": MAX_RESIDUES,
            "max_items": MAX_ITEMS,
            "actions": self.actions,
            "contacts": self.checkpoint.has_contact_head,
            "head": self.model.head,
            "labels": self.model.labels,
            "problem_type": None if config.classifier is None else config.classifier.problem_type,
            "synthetic": self.checkpoint.synthetic,
            # Of random weights only: another source may be a path on this machine.
            "source": self.checkpoint.source if self.checkpoint.synthetic else None,
            "precision": self.model.precision,
            "backend": self.model.backend,
            "version": __version__,
        }

    def describe_for_sdk(self) -> dict[str, Any]:
        """Describe the model as the hosted API's list does, which `biolmai model list` and `show` read."""
        synthetic = ", SYNTHETIC random weights" if self.checkpoint.synthetic else ""
        return {
            "model_name": self.model.name,
            "model_slug": self.slug,
            "actions": self.actions,
            "encoder": True,
            "predictor": "predict" in self.actions,
            "generator": False,
            "description": f"{self.model.config.num_layers} layers, served by numpyesm {__version__}{synthetic}",
            "tags": ["protein", "ESM-2"],
        }


class Catalog:
    """All served models.

    Parameters
    ----------
    models : mapping of str to ESM2
        By slug.

    Raises
    ------
    InvalidOption
        There is no model, or a slug cannot be part of a path.
    """

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

    def get(self, slug: str) -> ServedModel:
        """Find a model, or raise ApiError 404, which lists the models."""
        served = self._models.get(slug)
        if served is None:
            raise ApiError(404, f"there is no model {slug[:80]!r} here; there are {', '.join(self._models)}")
        return served

    def find(self, slug: str, action: str) -> ServedModel:
        """Find a model that has an action, or raise ApiError 404, which lists what there is."""
        served = self.get(slug)
        if action not in served.actions:
            head = missing_head(served.checkpoint, action)
            reason = f": its weights have no {head}" if head else ""
            raise ApiError(404, f"{slug} has no action {action[:80]!r}{reason}; it has {', '.join(served.actions)}")
        return served
