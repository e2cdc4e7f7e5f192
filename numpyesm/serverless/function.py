"""One container of the function: its model, its keys, and how it answers an event."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ..api.bodies import JSON_TYPE, AnswerForm, check_media, parse_json
from ..api.catalog import Catalog, ServedModel, check_slug
from ..api.errors import ADDRESS_ERRORS, ApiError, as_api_error, unavailable
from ..api.keys import KeyRing, read_keys
from ..api.requests import check_request
from ..errors import InvalidOption, NotEnoughMemory, NumpyesmError
from ..formats import json_bytes
from ..model import ESM2
from ..threads import default_threads
from .events import Request, read_event, write_answer

log = logging.getLogger("numpyesm.serverless")

# The largest answer that Lambda accepts, as JSON with a binary body in base64; and the part of it around the body.
_MAX_ANSWER = 6 << 20
_AROUND = 2048
# Fewest bytes of a number in an answer: what would be too large even so is refused before it is computed.
_LEAST_BYTES = 8.0
_LEAST_BYTES_BINARY = 4.0 * 4 / 3
# Memory of the function that the model may not use: for the runtime, the event, and the answer as text.
_KEPT_BACK = 56 << 20
# Seconds that are reserved for writing the refusal when the function's time is nearly up.
_RESERVE = 0.25
# MB of the function's memory; AWS gives one CPU for each so many of them.
_SIZE = "AWS_LAMBDA_FUNCTION_MEMORY_SIZE"
_MEMORY_PER_CPU = 1769


class Function:
    """What a container keeps from one event to the next.

    Settings are environment variables: `NUMPYESM_MODEL` (`slug=weights` or weights; by default `NUMPYESM_WEIGHTS`, else
    the one file in `weights/`), `NUMPYESM_API_KEYS`, `NUMPYESM_BACKEND`, `NUMPYESM_PRECISION`, `NUMPYESM_THREADS`.

    Parameters
    ----------
    catalog : Catalog, optional
        What to serve instead of the model that the environment names.
    """

    def __init__(self, catalog: Catalog | None = None) -> None:
        self._catalog = catalog
        self._keys = KeyRing(read_keys(None))

    def load(self) -> Catalog:
        """Return the one model under its slug; it is loaded and run once when first asked for."""
        if self._catalog is None:
            started = time.perf_counter()
            with warnings.catch_warnings():
                # Lambda's log takes lines; the synthetic warning must be among them.
                warnings.showwarning = lambda message, *_, **__: log.warning("%s", message)
                try:
                    slug, source = _chosen_model()
                    model = ESM2.from_pretrained(
                        source,
                        backend=os.environ.get("NUMPYESM_BACKEND") or "auto",
                        precision=os.environ.get("NUMPYESM_PRECISION") or "fp32",
                        **_limits(),
                    )
                except NotEnoughMemory as error:  # not even the smallest request would fit
                    raise ApiError(
                        503,
                        f"the function has too little memory ({os.environ.get(_SIZE)} MB, of which {_KEPT_BACK >> 20} "
                        f"MB are kept for the runtime and the answer): {error}",
                        code="server.memory",
                    ) from None
            # Whatever is made on first use is made now, in the init phase, so that the first event runs at full speed.
            model.encode(["M" * 30], include=["mean", "logits"] if model.checkpoint.has_lm_head else ["mean"])
            self._catalog = Catalog({slug or model.name: model})
            _print_line(event="loaded", model=repr(model), seconds=round(time.perf_counter() - started, 3))
        return self._catalog

    def handle(self, event: Any, context: Any = None) -> dict[str, Any]:
        """Answer one event in the form that AWS expects, whatever happens."""
        started = time.perf_counter()
        request_id = str(getattr(context, "aws_request_id", "") or uuid.uuid4())
        facts: dict[str, Any] = {"id": request_id}
        try:
            request = read_event(event)
            facts |= {"method": request.method, "path": request.path[:200]}
            answer = self._answer(request, context, facts)
        except Exception as error:
            refusal = as_api_error(error)
            if refusal.status == 500:
                log.error("request %s failed", request_id, exc_info=error)
            facts["reason"] = refusal.detail[:300]
            headers = {name.lower(): value for name, value in refusal.headers.items()}
            answer = write_answer(refusal.body(), {"content-type": JSON_TYPE} | headers, refusal.status)
        answer["headers"]["x-request-id"] = request_id
        for served in self._catalog or ():
            answer["headers"] |= served.headers
        _print_line(**facts, status=answer["statusCode"], bytes=len(answer["body"]), ms=_milliseconds(started))
        return answer

    def _served(self) -> Catalog:
        """`load`, whose failure is not the client's: the log says what it was."""
        try:
            return self.load()
        except NumpyesmError as error:
            log.error("the model cannot be loaded: %s", error)
            message = "this function cannot load its model; its log says why"
            raise ApiError(503, message, code="server.model") from error

    def _answer(self, request: Request, context: Any, facts: dict[str, Any]) -> dict[str, Any]:
        route = request.route()
        if "health" not in route:  # without keys, AWS decides who may call
            self._keys.identify(request.headers.get("authorization", "").encode("utf-8", "surrogatepass"))
        if "action" not in route:
            _check_method(request, "GET", "HEAD")
            return write_answer(json_bytes(_document(route, self._served())), {"content-type": JSON_TYPE})
        served = self._served().find(route["slug"], route["action"])
        _check_method(request, "POST")
        return _act(request, served, route["action"], context, facts)


def _act(request: Request, served: ServedModel, action: str, context: Any, facts: dict[str, Any]) -> dict[str, Any]:
    header = request.headers.get
    body = request.body(check_media(header("content-type"), header("content-encoding")))
    work = check_request(served, action, parse_json(body))
    form = AnswerForm.chosen(header("accept"), header("accept-encoding"))
    binary = form.npz or form.gzipped
    numbers = work.count_numbers()
    _check_size(numbers * (_LEAST_BYTES_BINARY if binary else _LEAST_BYTES), f"{numbers:,} numbers", binary)
    facts |= {"items": len(work.tokens), "residues": sum(work.lengths)}
    with _before_the_deadline(context):
        started = time.perf_counter()
        results = list(work.compute())
        facts["compute_ms"] = _milliseconds(started)
        content = b"".join(form.write(results))
    # In the answer to Lambda, JSON is text inside JSON: each quotation mark takes two bytes.
    size = len(content) * 4 / 3 + 4 if binary else len(content) + content.count(b'"')
    _check_size(size, f"{size / (1 << 20):.1f} MB", binary)
    return write_answer(content, form.headers, binary=binary)


def _document(route: dict[str, str], catalog: Catalog) -> dict[str, Any]:
    """Return what is to be read at an address: health, the list of models, one of them, or the schema of an action."""
    if "health" in route:
        return {"status": "ok"} if route["health"] == "healthz" else {"status": "ready", "models": catalog.slugs}
    if "models" in route:
        return {"models": [served.describe() for served in catalog]}
    if "sdk_slug" in route:
        return catalog.get(route["sdk_slug"]).describe_for_sdk()
    if "sdk_models" in route:
        return {"models": [served.describe_for_sdk() for served in catalog]}
    from ..api.schema import request_schema  # not in a cold start

    action = route["schema_action"]
    return request_schema(catalog.find(route["schema_slug"], action), action)


@contextmanager
def _before_the_deadline(context: Any) -> Iterator[None]:
    """Raise ApiError 503 in the block when the function's time is nearly up.

    Signals reach the main thread only, which is where Lambda calls a function; elsewhere, and without a Lambda context,
    nothing is interrupted.
    """
    remaining = getattr(context, "get_remaining_time_in_millis", None)
    if remaining is None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(_: int, __: FrameType | None) -> None:
        raise unavailable(
            "deadline",
            "the function's time was nearly up: send fewer or shorter sequences at a time, or raise the function's "
            "time-out or memory",
            retry_after=1,
        )

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(1e-3, remaining() / 1e3 - _RESERVE))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _chosen_model() -> tuple[str | None, str | None]:
    """(slug or None, weights or None for the default) from the environment, or the one file that was packed."""
    if setting := os.environ.get("NUMPYESM_MODEL", ""):
        slug, equals, source = setting.partition("=")
        if not equals:
            return None, setting
        if not source:
            raise InvalidOption(f"NUMPYESM_MODEL={setting!r}: expected weights, or slug=weights")
        return check_slug(slug), source
    if "NUMPYESM_WEIGHTS" in os.environ:
        return None, None
    packed = sorted(Path(os.environ.get("LAMBDA_TASK_ROOT", ".")).glob("weights/*.safetensors"))
    if len(packed) > 1:
        raise InvalidOption(f"weights/ holds {', '.join(p.name for p in packed)}: choose one with NUMPYESM_MODEL")
    return None, str(packed[0]) if packed else None


def _limits() -> dict[str, Any]:
    """Choose memory and threads for a Lambda function of this size; elsewhere, leave them to `ESM2.from_pretrained`.

    Lambda shows at least two CPUs, but gives them time in proportion to memory. More threads than whole CPUs would wait
    for each other at every product.
    """
    size = os.environ.get(_SIZE, "")
    if not size.isdigit():
        return {}
    limits = {"max_memory": max(1, (int(size) << 20) - _KEPT_BACK)}
    if not os.environ.get("NUMPYESM_THREADS"):
        limits["threads"] = max(1, min(default_threads(), int(size) // _MEMORY_PER_CPU))
    return limits


def _check_method(request: Request, *allowed: str) -> None:
    if request.method not in allowed:
        raise ApiError(405, ADDRESS_ERRORS[405], headers={"Allow": ", ".join(allowed)})


def _check_size(size: float, said: str, binary: bool) -> None:
    """Raise ApiError 413, which says what to ask for instead, if a body of so many bytes (in base64) cannot be sent."""
    if size + _AROUND <= _MAX_ANSWER:
        return
    other = "" if binary else "send Accept-Encoding: gzip or Accept: application/x-npz, or "
    raise ApiError(
        413,
        f"the answer has {said} and a Lambda function may send 6 MB: {other}ask for fewer items at a time, fewer "
        "layers, or less of per_token, contacts and logits",
        code="user.answer_too_large",
        problems=[(("params",), "ask for fewer outputs or layers"), (("items",), "send fewer items at a time")],
    )


def _milliseconds(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 2)


def _print_line(**facts: Any) -> None:
    """Write one JSON line to the function's log."""
    print(json.dumps(facts, default=str), flush=True)
