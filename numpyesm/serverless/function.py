"""One container of the function: its model, its keys, and what it does with an event."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidOption, NotEnoughMemory, NumpyesmError
from ..model import ESM2
from ..options import BY_LAYER
from ..service.errors import ApiError, invalid
from ..service.negotiation import JSON_TYPE, NPZ_TYPE, answer_form, check_json_type, is_gzipped, wants_gzip
from ..service.slugs import check_slug
from ..service.strict_json import parse_json
from ..threads import default_threads
from .deadline import Deadline, DeadlinePassed, Pace
from .events import NotARequest, Request, as_answer, read_event
from .validation import ACTIONS, MAX_ITEMS, Work, check_request, request_schema
from .writing import fits, may_fit, numbers_of, to_gzip, to_json, to_npz

if TYPE_CHECKING:
    from ..service.auth import KeyRing

log = logging.getLogger("numpyesm.serverless")

_GZIP_FROM = 256
# An estimate may be off: only what would take so many times the time that is left is refused without a try.
_HOPELESS = 1.5
# Of the function's memory that the model may not have: the runtime itself, the event, the answer as text.
_KEPT_BACK = 56 << 20
# MB of memory with which AWS gives one CPU.
_MEMORY_PER_CPU = 1769


@dataclass(frozen=True)
class _Answer:
    """What goes back, before AWS's form."""

    content: bytes
    headers: dict[str, str]
    status: int = 200
    binary: bool = False


class Function:
    """What a container keeps from one event to the next.

    Settings are environment variables: `NUMPYESM_MODEL` (`slug=weights` or weights; the one file in `weights/` by
    default), `NUMPYESM_API_KEYS`, `NUMPYESM_BACKEND`, `NUMPYESM_PRECISION`, `NUMPYESM_THREADS`.
    """

    def __init__(self) -> None:
        self._loaded: tuple[str, ESM2] | None = None
        self._keys: KeyRing | None = None
        self._pace = Pace()

    def load(self) -> tuple[str, ESM2]:
        """The model under its slug; loaded and run once when first asked for."""
        if self._loaded is None:
            started = time.perf_counter()
            slug, source = _chosen_model()
            with warnings.catch_warnings():
                # Lambda's log takes lines; the synthetic warning must be among them.
                warnings.showwarning = lambda message, *_, **__: log.warning("%s", message)
                try:
                    model = ESM2.from_pretrained(
                        source,
                        backend=os.environ.get("NUMPYESM_BACKEND") or "auto",
                        precision=os.environ.get("NUMPYESM_PRECISION") or "fp32",
                        threads=_threads(),
                        max_memory=_memory(),
                    )
                except NotEnoughMemory as error:  # no request of whatever size would fit
                    size = os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "")
                    raise ApiError(
                        503,
                        f"the function has too little memory ({size} MB, of which {_KEPT_BACK >> 20} MB are kept for "
                        f"the runtime and the answer): {error}",
                        code="server.memory",
                    ) from None
            # What is made when first used is made in the init phase; the first event then runs at full speed.
            model.encode(["M" * 30], include=["mean", "logits"] if model.checkpoint.has_lm_head else ["mean"])
            self._loaded = slug or model.name, model
            _print_line(event="loaded", model=repr(model), seconds=round(time.perf_counter() - started, 3))
        return self._loaded

    def handle(self, event: Any, context: Any = None) -> dict[str, Any]:
        """Answer one event; whatever happens, in the shape that AWS expects."""
        started = time.perf_counter()
        request_id = str(getattr(context, "aws_request_id", "") or uuid.uuid4())
        facts: dict[str, Any] = {"id": request_id}
        try:
            request = read_event(event)
            facts |= {"method": request.method, "path": request.path[:200]}
            answer = self._answer(request, Deadline(context), facts)
        except NotARequest as error:
            answer = _refusal(ApiError(400, str(error)))
        except ApiError as error:
            answer = _refusal(error)
            facts["reason"] = error.detail[:300]
        except NotEnoughMemory as error:
            answer = _refusal(ApiError(413, str(error), code="user.memory"))
        except DeadlinePassed:
            answer = _refusal(_too_late("the function's time was nearly up"))
        except MemoryError:
            answer = _refusal(ApiError(503, "not enough memory just now", code="server.memory"))
        except Exception as error:
            log.exception("request %s failed", request_id)
            known = isinstance(error, NumpyesmError)
            answer = _refusal(ApiError(500, "the model could not compute this request" if known else "internal error"))
        headers = answer.headers | {"x-request-id": request_id}
        if self._loaded is not None and self._loaded[1].checkpoint.synthetic:
            headers["x-numpyesm-weights"] = "synthetic: these numbers mean nothing"
        sent = as_answer(answer.status, answer.content, headers, answer.binary)
        _print_line(**facts, status=answer.status, bytes=len(sent["body"]), ms=_milliseconds(started))
        return sent

    def _answer(self, request: Request, deadline: Deadline, facts: dict[str, Any]) -> _Answer:
        route = request.route()
        if "health" in route:
            _check_method(request, "GET", "HEAD")
            slug, _ = self.load()
            return _json({"status": "ok"} if route["health"] == "healthz" else {"status": "ready", "models": [slug]})
        self._check_key(request)
        slug, model = self.load()
        if "models" in route:
            _check_method(request, "GET", "HEAD")
            return _json({"models": [_describe(slug, model)]})
        if "schema_slug" in route:
            _check_method(request, "GET", "HEAD")
            action = self._find(route["schema_slug"], route["schema_action"])
            return _json(request_schema(slug, action, model.config.num_layers))
        action = self._find(route["slug"], route["action"])
        _check_method(request, "POST")
        return self._act(request, action, model, deadline, facts)

    def _act(self, request: Request, action: str, model: ESM2, deadline: Deadline, facts: dict[str, Any]) -> _Answer:
        check_json_type(request.header("content-type"))
        body = request.body(is_gzipped(request.header("content-encoding")))
        work = check_request(action, parse_json(body), model.config.num_layers)
        _check_possible(work, model)
        form = "npz" if answer_form(request.header("accept")) == NPZ_TYPE else "json"
        if form == "json" and wants_gzip(request.header("accept-encoding")):
            form = "gzip"
        numbers = numbers_of(work, model.config)
        if not may_fit(numbers, form):
            raise _too_large(numbers, form)
        lengths = [length + 2 for length in work.lengths]
        facts |= {"items": len(lengths), "residues": sum(work.lengths)}
        dear = bool(work.include & {"contacts", "attentions"})
        deadline.check()
        expected = self._pace.expect(lengths, dear)
        if expected > _HOPELESS * deadline.left:
            self._pace.doubt()
            raise _too_late(f"this request takes about {expected:.1f} s")
        started = time.perf_counter()
        # Without an alarm nothing can interrupt: then one item at a time, with a look at the clock between.
        pieces = [work.sequences] if deadline.has_alarm else [[sequence] for sequence in work.sequences]
        results: list[Any] = []
        with deadline.alarm():
            for piece in pieces:
                deadline.check()
                results += _compute(model, work, piece)
            self._pace.note(lengths, dear, time.perf_counter() - started)
            for index, result in enumerate(results):
                if hasattr(result, "sequence_index"):
                    result.sequence_index = index
            facts["compute_ms"] = _milliseconds(started)
            content = to_npz(results) if form == "npz" else to_json(results)
            headers = {"content-type": NPZ_TYPE if form == "npz" else JSON_TYPE, "vary": "Accept, Accept-Encoding"}
            if form == "gzip" and len(content) >= _GZIP_FROM:
                content = to_gzip(content)
                headers["content-encoding"] = "gzip"
            binary = form == "npz" or "content-encoding" in headers
            # In the answer that Lambda takes, JSON is text in JSON: each quotation mark has two bytes.
            size = len(content) * 4 / 3 + 4 if binary else len(content) + content.count(b'"')
            if not fits(size):
                raise _too_large(numbers, form, size)
        return _Answer(content, headers, binary=binary)

    def _find(self, slug: str, action: str) -> str:
        known, model = self.load()
        if slug != known:
            raise ApiError(404, f"there is no model {slug[:80]!r} here; there are {known}")
        actions = _actions(model)
        if action not in actions:
            reason = ": its weights have no LM head" if action in ACTIONS else ""
            raise ApiError(404, f"{slug} has no action {action[:80]!r}{reason}; it has {', '.join(actions)}")
        return action

    def _check_key(self, request: Request) -> None:
        """ApiError 401 unless a known key was sent, or none is set: AWS decides who may call."""
        if self._keys is None:
            from ..service.auth import KeyRing, read_keys

            self._keys = KeyRing(read_keys(None))
        self._keys.identify(
            [value.encode("utf-8", "surrogatepass") for value in request.headers.get("authorization", ())]
        )


def _compute(model: ESM2, work: Work, sequences: list[str]) -> list[Any]:
    if work.action == "encode":
        return list(model.encode(sequences, work.layers, sorted(work.include)))
    if work.action == "predict":
        return list(model.predict(sequences, work.positions))
    return [float(score) for score in model.log_prob(sequences)]


def _chosen_model() -> tuple[str | None, str]:
    """(slug or None, weights) from `NUMPYESM_MODEL`, or the one file that was packed with the function."""
    if setting := os.environ.get("NUMPYESM_MODEL", ""):
        slug, equals, source = setting.partition("=")
        if not equals:
            return None, setting
        if not source:
            raise InvalidOption(f"NUMPYESM_MODEL={setting!r}: expected weights, or slug=weights")
        return check_slug(slug), source
    packed = sorted(Path(os.environ.get("LAMBDA_TASK_ROOT", ".")).glob("weights/*.safetensors"))
    if len(packed) > 1:
        raise InvalidOption(f"weights/ holds {', '.join(p.name for p in packed)}: choose one with NUMPYESM_MODEL")
    return None, str(packed[0]) if packed else "esm2-35m"


def _memory() -> int | None:
    """Bytes for the process in a Lambda function of this size; None elsewhere."""
    size = os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "")
    return (int(size) << 20) - _KEPT_BACK if size.isdigit() else None


def _threads() -> int | None:
    """As many as the function has whole CPUs: Lambda shows at least two and gives them their time by its memory.

    More threads than CPUs would wait for each other at every product.
    """
    size = os.environ.get("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "")
    if not size.isdigit() or os.environ.get("NUMPYESM_THREADS"):
        return None
    return max(1, min(default_threads(), int(size) // _MEMORY_PER_CPU))


def _actions(model: ESM2) -> tuple[str, ...]:
    return ACTIONS if model.checkpoint.has_lm_head else ("encode",)


def _describe(slug: str, model: ESM2) -> dict[str, Any]:
    from .._version import __version__
    from ..config import MAX_RESIDUES

    config = model.config
    return {
        "slug": slug,
        "name": model.name,
        "layers": config.num_layers,
        "width": config.embed_dim,
        "heads": config.num_heads,
        "max_length": MAX_RESIDUES,
        "max_items": MAX_ITEMS,
        "actions": list(_actions(model)),
        "contacts": model.checkpoint.has_contact_head,
        "synthetic": model.checkpoint.synthetic,
        "precision": model.precision,
        "backend": model.backend,
        "version": __version__,
    }


def _check_method(request: Request, *allowed: str) -> None:
    if request.method not in allowed:
        raise ApiError(405, "this address does not take this method", headers={"Allow": ", ".join(allowed)})


def _check_possible(work: Work, model: ESM2) -> None:
    """ApiError 422 for what is well formed and cannot be had from these weights."""
    problems: list[tuple[tuple[str | int, ...], str]] = []
    if work.action == "encode" and work.include & BY_LAYER and not work.layers:
        problems.append((("params", "repr_layers"), "name at least one layer, or include only outputs without layers"))
    if "logits" in work.include and not model.checkpoint.has_lm_head:
        problems.append((("params", "include"), f"logits: the weights of {model.name} have no LM head"))
    if "contacts" in work.include and not model.checkpoint.has_contact_head:
        problems.append((("params", "include"), f"contacts: the weights of {model.name} have no contact head"))
    if problems:
        raise invalid(problems)


def _too_large(numbers: int, form: str, size: float | None = None) -> ApiError:
    """413 that says what to ask less of."""
    room = f"{size / (1 << 20):.1f} MB" if size is not None else f"{numbers:,} numbers"
    other = "" if form != "json" else "send Accept-Encoding: gzip or Accept: application/x-npz, or "
    return ApiError(
        413,
        f"the answer has {room} and a Lambda function may send 6 MB: {other}ask for fewer items at a time, fewer "
        "layers, or less of per_token, contacts and logits",
        code="user.answer_too_large",
        problems=[(("params",), "ask for fewer outputs or layers"), (("items",), "send fewer items at a time")],
    )


def _too_late(what: str) -> ApiError:
    return ApiError(
        503,
        f"{what}: send fewer or shorter sequences at a time, or raise the function's time-out or memory",
        code="server.deadline",
        headers={"Retry-After": "1"},
    )


def _refusal(error: ApiError) -> _Answer:
    headers = {name.lower(): value for name, value in error.headers.items()}
    return _Answer(error.body(), {"content-type": JSON_TYPE} | headers, error.status)


def _json(document: Mapping[str, Any]) -> _Answer:
    return _Answer(json.dumps(document, separators=(",", ":")).encode(), {"content-type": JSON_TYPE})


def _milliseconds(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 2)


def _print_line(**facts: Any) -> None:
    """One JSON line in the function's log."""
    print(json.dumps(facts, default=str), flush=True)
