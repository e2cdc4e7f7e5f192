"""The application: routes, and what each of them does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.requests import Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from .access_log import AccessLog
from .auth import KeyRing
from .bodies import read_body
from .catalog import Catalog, ServedModel
from .docs_page import docs_page
from .engine import Engine
from .errors import ApiError, ClientGone, invalid
from .gate import Gate, Receive, Scope, Send, record_of, send_error
from .jobs import Work
from .metrics import TEXT_TYPE, Metrics
from .negotiation import answer_form, check_json_type, is_gzipped, wants_gzip
from .openapi import action_schema, openapi_document
from .page_files import CONTENT_SECURITY_POLICY, read_page
from .result_response import ResultResponse
from .schemas import check_request
from .settings import Settings
from .strict_json import parse_json

_VERSIONS = ("/api/v3", "/api/v1")


class Service:
    """All parts of a running service; `app` is what a server runs.

    Parameters
    ----------
    catalog : Catalog
    keys : KeyRing
    settings : Settings
    access_log : AccessLog, optional
        To stdout by default.
    """

    def __init__(
        self,
        catalog: Catalog,
        keys: KeyRing | None = None,
        settings: Settings | None = None,
        access_log: AccessLog | None = None,
    ) -> None:
        self.catalog = catalog
        self.keys = keys or KeyRing()
        self.settings = settings or Settings()
        self.metrics = Metrics()
        self.engine = Engine(catalog, self.settings, self.metrics.forward_pass)
        self.metrics.watch(self.engine)
        self._log = access_log or AccessLog()
        self._answering = ThreadPoolExecutor(4, thread_name_prefix="numpyesm-answer")
        self.gate = Gate(_routes(self), self.settings, self.metrics, self._log)

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Engine and log run while the server does."""
        self._log.start()
        await asyncio.get_running_loop().run_in_executor(None, self.engine.start)
        try:
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, self.engine.stop)
            self._answering.shutdown(wait=False, cancel_futures=True)
            self._log.stop()

    async def act(self, request: Request, slug: str, action: str) -> ResultResponse | NoResponse:
        """One `encode`, `predict` or `log_prob`."""
        record = record_of(request.scope)
        due = time.monotonic() + self.settings.deadline
        record.route = "other"
        record.client = self.keys.identify(_all_headers(request, "authorization")) or record.client
        served = self.catalog.find(slug, action)
        record.route, record.slug = action, served.slug
        self.engine.check_room(record.client)
        headers = request.headers
        check_json_type(headers.get("content-type"))
        gzipped = is_gzipped(headers.get("content-encoding"))
        try:
            body = await read_body(request.receive, headers.get("content-length"), gzipped, self.settings)
            work = Work.of(served, action, check_request(action, parse_json(body), served.model.config.num_layers))
            _check_possible(work)
            record.facts |= {
                "slug": slug,
                "action": action,
                "items": len(work.sequences),
                "residues": sum(work.lengths),
            }
            return await self._compute(request, work, due)
        except ClientGone:
            record.hung_up = True
            return NoResponse()

    async def _compute(self, request: Request, work: Work, due: float) -> ResultResponse:
        record = record_of(request.scope)
        job = self.engine.submit(work, record.client)
        gone = asyncio.create_task(_hang_up(request.receive))
        try:
            ends: set[asyncio.Future[Any]] = {job.done, gone}
            left = max(0.0, due - time.monotonic())
            await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if job.started is not None:
                record.facts["queue_ms"] = round((job.started - job.arrived) * 1e3, 2)
            if job.done.done():
                results = job.done.result()
            elif gone.done():
                raise ClientGone
            else:
                raise ApiError(
                    503,
                    f"no result within {self.settings.deadline:g} seconds",
                    code="server.deadline",
                    headers={"Retry-After": str(self.engine.retry_after())},
                )
            if job.computed is not None:
                record.facts["compute_ms"] = round((job.computed - (job.started or job.arrived)) * 1e3, 2)
            headers = request.headers
            response = ResultResponse(
                results,
                form=answer_form(", ".join(headers.getlist("accept"))),
                gzipped=wants_gzip(headers.get("accept-encoding")),
                size=job.memory,
                gone=gone,
                release=lambda: self.engine.release(job),
                threads=self._answering,
            )
        except BaseException:
            gone.cancel()
            job.done.cancel()
            self.engine.release(job)
            raise
        return response


class NoResponse:
    """For a client that is gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        return


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _all_headers(request: Request, name: str) -> list[bytes]:
    return [value for key, value in request.scope["headers"] if key == name.encode()]


def _check_possible(work: Work) -> None:
    """ApiError 422 for what is well formed and cannot be had from these weights."""
    problems: list[tuple[tuple[str | int, ...], str]] = []
    checkpoint = work.served.checkpoint
    if work.by_layer and not work.layers:
        problems.append((("params", "repr_layers"), "name at least one layer, or include only outputs without layers"))
    if "logits" in work.include and not checkpoint.has_lm_head:
        problems.append((("params", "include"), f"logits: the weights of {work.served.slug} have no LM head"))
    if "contacts" in work.include and not checkpoint.has_contact_head:
        problems.append((("params", "include"), f"contacts: the weights of {work.served.slug} have no contact head"))
    if problems:
        raise invalid(problems)


def _json(document: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status, media_type="application/json")


def _routes(service: Service) -> FastAPI:
    app = FastAPI(
        title="numpyesm",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=service.lifespan,
    )
    page = read_page()
    openapi = orjson.dumps(openapi_document(service.catalog))
    docs = docs_page(orjson.loads(openapi))

    def get(path: str, endpoint: Callable[..., Awaitable[Any]], route: str) -> None:
        async def run(request: Request) -> Any:
            record_of(request.scope).route = route
            return await endpoint(request)

        for form in {path, path.rstrip("/") or "/", path.rstrip("/") + "/"} if path != "/" else {"/"}:
            app.router.add_route(form, run, methods=["GET"], include_in_schema=False)

    async def health(_: Request) -> Response:
        if not service.engine.alive:
            raise ApiError(503, "the engine has stopped", code="server.not_ready", headers={"Retry-After": "5"})
        return _json({"status": "ok"})

    async def ready(_: Request) -> Response:
        if not service.engine.alive or service.engine.draining:
            reason = "shutting down" if service.engine.draining else "the engine has stopped"
            raise ApiError(503, reason, code="server.not_ready", headers={"Retry-After": "5"})
        return _json({"status": "ready", "models": service.catalog.slugs, "waiting": service.engine.waiting})

    async def metrics(_: Request) -> Response:
        return Response(service.metrics.page(), media_type=TEXT_TYPE)

    async def models(_: Request) -> Response:
        return _json({"models": [served.describe() for served in service.catalog]})

    async def schema(request: Request) -> Response:
        slug, action = request.path_params["slug"], request.path_params["action"]
        served: ServedModel = service.catalog.find(slug, action)
        return _json(action_schema(served, action))

    async def openapi_page(_: Request) -> Response:
        return Response(openapi, media_type="application/json")

    async def docs_html(request: Request) -> Response:
        headers = {"Content-Security-Policy": docs.content_security_policy, "Cache-Control": "no-cache"}
        host = request.headers.get("host")
        html = docs.at(f"{request.scope['scheme']}://{host}") if host else docs.html
        return Response(html, media_type="text/html; charset=utf-8", headers=headers)

    async def static(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        file = page.get(name)
        if file is None:
            raise ApiError(404, "there is nothing at this address")
        headers = {
            "Content-Security-Policy": CONTENT_SECURITY_POLICY,
            "Cache-Control": "no-cache",
            "ETag": file.etag,
        }
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, headers=headers | {"Content-Type": file.media_type})

    get("/", static, "page")
    app.router.add_route("/page/{name:path}", static, methods=["GET"], include_in_schema=False)
    get("/healthz", health, "healthz")
    get("/readyz", ready, "readyz")
    get("/metrics", metrics, "metrics")
    get("/docs", docs_html, "docs")
    get("/openapi.json", openapi_page, "openapi")
    for prefix in _VERSIONS:
        get(f"{prefix}/models/", models, "models")
        get(f"{prefix}/schema/{{slug}}/{{action}}/", schema, "schema")

        async def act(request: Request) -> ResultResponse | NoResponse:
            return await service.act(request, request.path_params["slug"], request.path_params["action"])

        for form in (f"{prefix}/{{slug}}/{{action}}/", f"{prefix}/{{slug}}/{{action}}"):
            app.router.add_route(form, act, methods=["POST"], include_in_schema=False)  # type: ignore[arg-type]

    async def on_api_error(_: Request, error: Exception) -> Any:
        assert isinstance(error, ApiError)
        return _ErrorResponse(error)

    async def on_failure(_: Request, error: Exception) -> Any:
        # The gate, which the exception reaches too, logs it.
        return _ErrorResponse(ApiError(500, "internal error"))

    async def on_http_error(_: Request, error: Exception) -> Any:
        assert isinstance(error, HTTPException)
        detail = {404: "there is nothing at this address", 405: "this address does not take this method"}.get(
            error.status_code, str(error.detail)
        )
        return _ErrorResponse(ApiError(error.status_code, detail, headers=error.headers))

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_failure)
    return app


class _ErrorResponse:
    """An ApiError as an ASGI response."""

    def __init__(self, error: ApiError) -> None:
        self._error = error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_error(send, self._error)
