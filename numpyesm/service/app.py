"""The application: its addresses, and what each of them answers."""

from __future__ import annotations

import asyncio
import mimetypes
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from ..api.bodies import parse_json
from ..api.catalog import Catalog
from ..api.errors import ApiError
from ..api.keys import KeyRing
from ..api.media import JSON_TYPE, answer_form, check_json_type, is_gzipped, wants_gzip
from ..api.requests import Work, check_request
from ..api.schema import openapi_document, request_schema
from ..errors import NumpyesmError
from ..formats import json_bytes
from .access_log import AccessLog
from .bodies import ClientGone, read_body
from .engine import Engine
from .gate import Gate, record_of
from .metrics import TEXT_TYPE, Metrics
from .result_response import ResultResponse
from .settings import Settings

Endpoint = Callable[[Request], Awaitable[ASGIApp]]

# Nothing from elsewhere; pictures that the page draws itself come as blob: or data:.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = Path(__file__).parent / "page"


class Service:
    """All parts of a running service; `gate` is the ASGI application that a server runs.

    Parameters
    ----------
    catalog : Catalog
    keys : KeyRing, optional
        None by default: everybody is let in.
    settings : Settings, optional
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
        self._writers = ThreadPoolExecutor(4, thread_name_prefix="numpyesm-answer")
        self._openapi = json_bytes(openapi_document(catalog))
        router = Router(self._routes(), redirect_slashes=False, lifespan=self.lifespan)
        self.gate = Gate(router, self.settings, self.metrics, self._log)

    def prepare(self) -> None:
        """Start the threads, and have ready what the first request would otherwise wait for.

        Raises
        ------
        InvalidOption
            The memory limit leaves nothing for requests.
        NumpyesmError
            The system allows no more threads.
        """
        try:
            self._log.start()
            self.engine.prepare()
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
            raise NumpyesmError(f"the service cannot start its threads: {error}") from error

    @asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """Run the engine, of a service that is prepared, while the server runs."""
        self.engine.start()
        try:
            yield
        finally:
            await self.engine.stop()
            self._writers.shutdown(wait=False, cancel_futures=True)
            self._log.stop()

    # -- addresses ------------------------------------------------------------------------------------------------

    def _routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = []

        def add(path: str, endpoint: Endpoint, name: str, method: str = "GET") -> None:
            async def run(request: Request) -> ASGIApp:
                record_of(request.scope).route = name
                return await endpoint(request)

            for form in (path, f"{path}/") if path else ("/",):
                routes.append(Route(form, run, methods=[method]))

        for version in ("/api/v3", "/api/v1"):
            add(f"{version}/models", self._models, "models")
            add(f"{version}/schema/{{slug}}/{{action}}", self._schema, "schema")
            add(f"{version}/{{slug}}/{{action}}", self._act, "other", "POST")
        for prefix in ("/api/ui", "/ui"):  # where `biolmai model list` and `show` look
            add(f"{prefix}/community-api-models", self._sdk_models, "models")
            add(f"{prefix}/community-api-models/{{slug}}", self._sdk_model, "models")
        add("/healthz", self._health, "healthz")
        add("/readyz", self._ready, "readyz")
        add("/metrics", self._metrics, "metrics")
        add("/openapi.json", self._openapi_page, "openapi")
        mimetypes.add_type("text/javascript", ".js")  # a registry of Windows may say otherwise
        page = _Page(directory=_PAGE)
        add("/docs", lambda request: page.file("docs.html", request), "docs")
        add("", lambda request: page.file("index.html", request), "page")
        routes.append(Mount("/page", page))
        return routes

    async def _health(self, _: Request) -> ASGIApp:
        if not self.engine.alive:
            raise ApiError(503, "the engine has stopped", code="server.not_ready", headers={"Retry-After": "5"})
        return _json({"status": "ok"})

    async def _ready(self, _: Request) -> ASGIApp:
        if not self.engine.alive or self.engine.draining:
            reason = "shutting down" if self.engine.draining else "the engine has stopped"
            raise ApiError(503, reason, code="server.not_ready", headers={"Retry-After": "5"})
        return _json({"status": "ready", "models": self.catalog.slugs, "waiting": self.engine.waiting})

    async def _metrics(self, _: Request) -> ASGIApp:
        return Response(self.metrics.page(), media_type=TEXT_TYPE)

    async def _models(self, _: Request) -> ASGIApp:
        return _json({"models": [served.describe() for served in self.catalog]})

    async def _sdk_models(self, _: Request) -> ASGIApp:
        return _json({"models": [served.describe_for_sdk() for served in self.catalog]})

    async def _sdk_model(self, request: Request) -> ASGIApp:
        return _json(self.catalog.get(request.path_params["slug"]).describe_for_sdk())

    async def _schema(self, request: Request) -> ASGIApp:
        action = request.path_params["action"]
        return _json(request_schema(self.catalog.find(request.path_params["slug"], action), action))

    async def _openapi_page(self, _: Request) -> ASGIApp:
        return Response(self._openapi, media_type=JSON_TYPE)

    # -- computing ------------------------------------------------------------------------------------------------

    async def _act(self, request: Request) -> ASGIApp:
        """Answer one `encode`, `predict` or `log_prob`."""
        due = time.monotonic() + self.settings.deadline
        record, headers = record_of(request.scope), request.headers
        authorization = [value.encode("latin-1") for value in headers.getlist("authorization")]
        record.client = self.keys.identify(authorization) or record.client
        slug, action = request.path_params["slug"], request.path_params["action"]
        served = self.catalog.find(slug, action)
        record.route, record.slug = action, slug
        self.engine.check_place(record.client)
        check_json_type(headers.get("content-type"))
        gzipped = is_gzipped(headers.get("content-encoding"))
        body = await read_body(request.receive, headers.get("content-length"), gzipped, self.settings)
        work = check_request(served, action, parse_json(body))
        record.facts |= {"slug": slug, "action": action, "items": len(work.tokens), "residues": sum(work.lengths)}
        return await self._compute(request, work, due)

    async def _compute(self, request: Request, work: Work, due: float) -> ResultResponse:
        record, headers = record_of(request.scope), request.headers
        job = self.engine.submit(work, record.client)
        gone = asyncio.create_task(_hang_up(request.receive))
        try:
            left = max(0.0, due - time.monotonic())
            ends: set[asyncio.Future[Any]] = {job.done, gone}
            await asyncio.wait(ends, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if job.started is not None:
                record.facts["queue_ms"] = round((job.started - job.arrived) * 1e3, 2)
            if not job.done.done():
                if gone.done():
                    raise ClientGone
                raise ApiError(
                    503,
                    f"no result within {self.settings.deadline:g} seconds",
                    code="server.deadline",
                    headers={"Retry-After": str(self.engine.retry_after())},
                )
            results = job.done.result()
            if job.computed is not None:
                record.facts["compute_ms"] = round((job.computed - (job.started or job.arrived)) * 1e3, 2)
            return ResultResponse(
                results,
                form=answer_form(", ".join(headers.getlist("accept"))),
                gzipped=wants_gzip(", ".join(headers.getlist("accept-encoding"))),
                size=job.memory,
                gone=gone,
                release=lambda: self.engine.release(job),
                threads=self._writers,
            )
        except BaseException:
            gone.cancel()
            self.engine.release(job)
            raise


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(document: Any) -> Response:
    return Response(json_bytes(document), media_type=JSON_TYPE)


class _Page(StaticFiles):
    """The files of the page, asked for anew each time, under a policy that lets nothing in from elsewhere."""

    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers["Content-Security-Policy"] = _PAGE_POLICY
        response.headers["Cache-Control"] = "no-cache"
        return response

    async def file(self, name: str, request: Request) -> ASGIApp:
        """Answer with one file."""
        return await self.get_response(name, request.scope)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record_of(scope).route = "page"
        await super().__call__(scope, receive, send)
