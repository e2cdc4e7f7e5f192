"""scikit-learn: protein sequences in, embeddings or classes out, as estimators for pipelines (extra `sklearn`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .alphabet import tokenize, warn_of_odd_sequences
from .config import Classifier
from .errors import InvalidOption, MissingExtra, MissingHead, WeightsNotFound, warn
from .given import Sequences, texts
from .model import ESM2, SyntheticWeightsWarning
from .options import (
    Outputs,
    check_backend,
    check_precision,
    number_within,
    one_of,
    require_classifier,
    whole_number,
)
from .passes import Tokens
from .threads import Lock, check_threads
from .weights.locate import default_weights, resolve, state_of

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
except ImportError as error:
    raise MissingExtra("numpyesm.sklearn needs scikit-learn: pip install 'numpyesm[sklearn]'") from error

POOLING = ("mean", "bos")
Estimator = TypeVar("Estimator", bound="_FromWeights")

# Copies of an estimator (clone, every fold of a cross-validation) share one loaded model per process.
_loaded: dict[tuple[Any, ...], ESM2] = {}
_lock = Lock()


class _FromWeights(BaseEstimator):  # type: ignore[misc]
    """Base of the estimators: weights are loaded when they are needed, and nothing is fitted."""

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        *,
        backend: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        batch_size: int = 256,
    ) -> None:
        self.weights = weights
        self.backend = backend
        self.precision = precision
        self.threads = threads
        self.batch_size = batch_size

    def fit(self: Estimator, X: Sequences, y: object = None) -> Estimator:
        """Check parameters and sequences, and keep nothing.

        Parameters
        ----------
        X : iterable of str
            A list, a generator, an array, a Series, a mapping from ids, or a frame or array of one column.
        y : ignored
        """
        self._checked(as_sequences(X))
        return self

    def _checked(self, sequences: list[Any]) -> list[Tokens]:
        """Check the parameters; return tokens of all sequences, checked before hours are spent on the first."""
        number_within("batch_size", self.batch_size, 1)
        check_backend(self.backend)
        check_precision(self.precision)
        if self.threads is not None:
            check_threads(self.threads)
        return tokenize(sequences)

    def _batches(self, tokens: list[Tokens]) -> Iterator[list[Tokens]]:
        for start in range(0, len(tokens), self.batch_size):
            yield tokens[start : start + self.batch_size]

    def _model(self) -> ESM2:
        named = default_weights() if self.weights is None else self.weights
        try:
            state = state_of(resolve(named, allow_download=False))
        except WeightsNotFound:  # loading fetches them, or says so
            state = (os.fspath(named),)
        key = (state, self.backend, self.precision, self.threads, os.getpid())
        with _lock:
            model = _loaded.get(key)
            if model is None:
                model = ESM2.from_pretrained(
                    self.weights, backend=self.backend, precision=self.precision, threads=self.threads
                )
                _loaded.clear()  # one at a time: a search over models should not hold them all
                _loaded[key] = model
            elif model.checkpoint.synthetic:
                warn(f"{model.checkpoint.source}: SYNTHETIC random weights.", SyntheticWeightsWarning)
        return model

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.two_d_array = False
        tags.no_validation = True
        tags.requires_fit = False
        return tags


class ESM2Embedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _FromWeights):  # type: ignore[misc]
    """Embeddings of protein sequences.

    `fit` only checks its input. The weights are loaded by the first `transform`, once per process for all estimators
    with the same parameters, and never pickled: an unpickled estimator loads them again by name.

    Parameters
    ----------
    weights : str or path, optional
        What `ESM2.from_pretrained` takes.
    layer : int, default -1
        0 is the embedding, -1 the last layer.
    pooling : {"mean", "bos"}, default "mean"
        Mean over the residues, or the `<cls>` row.
    backend, precision, threads
        See `ESM2`. In a cross-validation with `n_jobs`, `threads=1` keeps the processes from competing for CPUs.
    batch_size : int, default 256
        Sequences passed to the model at a time; results depend on it only by rounding.

    Examples
    --------
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.linear_model import Ridge
    >>> from numpyesm.sklearn import ESM2Embedder
    >>> model = make_pipeline(ESM2Embedder("synthetic:esm2-8m"), Ridge()).fit(["MKT", "AYI"], [0.0, 1.0])
    """

    def __init__(
        self,
        weights: str | os.PathLike[str] | None = None,
        *,
        layer: int = -1,
        pooling: str = "mean",
        backend: str = "auto",
        precision: str = "fp32",
        threads: int | None = None,
        batch_size: int = 256,
    ) -> None:
        super().__init__(weights, backend=backend, precision=precision, threads=threads, batch_size=batch_size)
        self.layer = layer
        self.pooling = pooling

    def transform(self, X: Sequences) -> npt.NDArray[np.float32]:
        """Embeddings, one row per sequence: (n, D).

        Raises
        ------
        InvalidSequence
            A ValueError that names the item, the position and what is allowed.
        """
        sequences = as_sequences(X)
        tokens = self._checked(sequences)
        model = self._model()
        outputs = Outputs.check(model.checkpoint, [self.layer], [self.pooling])
        warn_of_odd_sequences(sequences)
        rows = np.empty((len(tokens), model.config.embed_dim), np.float32)
        results = chain.from_iterable(model.passes.encode(batch, outputs) for batch in self._batches(tokens))
        for row, result in zip(rows, results, strict=True):
            (pooled,) = result.to_arrays().values()
            row[...] = pooled
        return rows

    def fit_transform(self, X: Sequences, y: object = None) -> npt.NDArray[np.float32]:
        """Embeddings, as from `transform`; a generator is read only once."""
        return self.transform(X)

    @property
    def _n_features_out(self) -> int:
        """Number of features, for scikit-learn's `get_feature_names_out`."""
        return self._model().config.embed_dim

    def _checked(self, sequences: list[Any]) -> list[Tokens]:
        one_of("pooling", self.pooling, POOLING)
        if whole_number(self.layer) is None:
            raise InvalidOption(f"layer={self.layer!r}: expected a whole number")
        return super()._checked(sequences)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = []
        return tags


class ESM2Classifier(ClassifierMixin, _FromWeights):  # type: ignore[misc]
    """A classifier that was fine-tuned elsewhere, for sequences.

    `fit` only checks its input. Weights are loaded and shared as by `ESM2Embedder`.

    Parameters
    ----------
    weights : str or path
        What `ESM2.from_pretrained` takes, with a classification head for sequences; also the folder of an adapter.
    backend, precision, threads, batch_size
        As for `ESM2Embedder`.

    Attributes
    ----------
    classes_ : ndarray of str (labels,)
        In alphabetical order, as scikit-learn's own classifiers have them, whatever their order in the head.
    """

    def predict_proba(self, X: Sequences) -> npt.NDArray[np.float32]:
        """Probability of each label, columns in the order of `classes_`: (n, labels).

        Raises
        ------
        InvalidSequence
            A ValueError that names the item, the position and what is allowed.
        MissingHead
            The weights have no classification head for sequences.
        """
        sequences = as_sequences(X)
        tokens = self._checked(sequences)
        warn_of_odd_sequences(sequences)
        model, labels = self._model(), self._head().labels
        rows = [result.probabilities for batch in self._batches(tokens) for result in model.passes.classify(batch)]
        return np.array(rows, np.float32).reshape(len(tokens), len(labels))[:, np.argsort(labels)]

    def predict(self, X: Sequences) -> npt.NDArray[Any]:
        """The most probable label of each sequence (n,) or, if several may hold, 0 or 1 for each: (n, labels)."""
        probabilities = self.predict_proba(X)
        if self._head().problem_type == "multi_label_classification":
            return (probabilities >= 0.5).astype(np.int64)
        labels: npt.NDArray[Any] = self.classes_[probabilities.argmax(axis=1)]
        return labels

    @property
    def classes_(self) -> npt.NDArray[np.str_]:
        """The labels in the order that scikit-learn's metrics take for granted."""
        return np.sort(self._head().labels)

    def _head(self) -> Classifier:
        model = self._model()
        head = require_classifier(model.checkpoint)
        if head.head != "sequence" or head.problem_type == "regression":
            kind = "for residues" if head.head == "token" else "that gives no probabilities (regression)"
            raise MissingHead(f"{model.checkpoint.source} has a head {kind}: use ESM2.classify")
        return head


def as_sequences(X: Any) -> list[Any]:
    """Return the sequences as a list; rows of one text each, which scikit-learn calls a column, are accepted."""
    return [item[0] if isinstance(item, list | tuple | np.ndarray) and len(item) == 1 else item for item in texts(X)]
