"""The application: its addresses and their answers."""

from __future__ import annotations

import mimetypes
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from ..api.bodies import JSON_TYPE
from ..api.catalog import Catalog
from ..api.keys import KeyRing
from ..api.schema import openapi_document, request_schema
from ..errors import NumpyesmError
from ..formats import json_bytes
from .actions import Actions
from .engine import Engine
from .gate import Gate
from .settings import Settings
from .telemetry import Telemetry, record_of

# Nothing is loaded from elsewhere, no text becomes HTML; pictures that the page draws itself are blob: or data: URLs.
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
_PAGE = Path(__file__).parent / "page"


class Service:
    """All parts of a running service; `gate` is the ASGI application that a server runs.

    The models are warmed up, so that the first request does not wait.

    Parameters
    ----------
    catalog : Catalog
    keys : KeyRing, optional
        None by default: anyone may use the service.
    settings : Settings, optional
    log_to : text file, optional
        For the access log; stdout by default.

    Raises
    ------
    InvalidOption
        The memory limit leaves no room for any request.
    NumpyesmError
        The system allows no more threads.
    """

    def __init__(
        self,
        catalog: Catalog,
        keys: KeyRing | None = None,
        settings: Settings | None = None,
        log_to: TextIO | None = None,
    ) -> None:
        self.catalog = catalog
        self.settings = settings or Settings()
        try:
            # Before the engine checks what `ulimit -v` leaves: a thread takes some of it.
            self.telemetry = Telemetry(log_to)
            self.engine = Engine(catalog, self.settings, self.telemetry.forward_pass)
        except RuntimeError as error:
            if "start new thread" not in str(error):
                raise
            raise NumpyesmError(f"the service cannot start its threads: {error}") from error
        self.telemetry.watch(self.engine)
        self._actions = Actions(catalog, keys or KeyRing(), self.engine, self.settings)
        router = Router(self._routes(), redirect_slashes=False, lifespan=self.lifespan)
        self.gate = Gate(router, self.settings, self.telemetry)

    @asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """Run the engine while the server runs."""
        self.engine.start()
        try:
            yield
        finally:
            await self.engine.stop()
            self.telemetry.stop()

    def _routes(self) -> list[BaseRoute]:
        catalog, openapi = self.catalog, openapi_document(self.catalog)
        routes: list[BaseRoute] = []

        def add(path: str, name: str, document: Callable[[Request], Any]) -> None:
            async def answer(request: Request) -> Response:
                record_of(request.scope).route = name
                found = document(request)
                return found if isinstance(found, Response) else Response(json_bytes(found), media_type=JSON_TYPE)

            routes.append(Route(path, answer))

        def schema(request: Request) -> Any:
            slug, action = request.path_params["slug"], request.path_params["action"]
            return request_schema(catalog.find(slug, action), action)

        for version in ("/api/v3", "/api/v1"):
            add(f"{version}/models", "models", lambda _: {"models": [served.describe() for served in catalog]})
            add(f"{version}/schema/{{slug}}/{{action}}", "schema", schema)
            routes.append(Route(f"{version}/{{slug}}/{{action}}", self._actions, methods=["POST"]))
        for path in ("/api/ui/community-api-models", "/ui/community-api-models"):
            add(path, "models", lambda _: {"models": [served.describe_for_sdk() for served in catalog]})
            add(f"{path}/{{slug}}", "models", lambda request: catalog.get(**request.path_params).describe_for_sdk())
        add("/healthz", "healthz", self._health)
        add("/readyz", "readyz", self._ready)
        add("/openapi.json", "openapi", lambda _: openapi)
        add("/metrics", "metrics", lambda _: Response(self.telemetry.page(), media_type=CONTENT_TYPE_LATEST))
        mimetypes.add_type("text/javascript", ".js")  # the registry of Windows may say otherwise
        page = _Page(directory=_PAGE)
        front, docs = (partial(page.get_file, name) for name in ("index.html", "docs.html"))
        return [*routes, Route("/", front), Route("/docs", docs), Mount("/page", page)]

    def _health(self, _: Request) -> Any:
        self.engine.check_alive()
        return {"status": "ok"}

    def _ready(self, _: Request) -> Any:
        self.engine.check_accepting()
        return {"status": "ready", "models": self.catalog.slugs, "waiting": self.engine.waiting}


class _Page(StaticFiles):
    """The files of the page, revalidated each time, under a policy that loads nothing from elsewhere."""

    async def get_file(self, name: str, request: Request) -> Response:
        """Answer with one file, at another address."""
        return await self.get_response(name, request.scope)

    async def get_response(self, path: str, scope: Scope) -> Response:
        record_of(scope).route = "docs" if path == "docs.html" else "page"
        response = await super().get_response(path, scope)
        response.headers["Content-Security-Policy"] = _PAGE_POLICY
        response.headers["Cache-Control"] = "no-cache"
        return response
