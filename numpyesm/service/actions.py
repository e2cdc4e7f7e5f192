"""Answer an action, such as `encode`: read the body, have it computed, send the results."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..api.bodies import AnswerForm, check_media, gunzip, parse_json, too_large
from ..api.catalog import Catalog
from ..api.errors import ApiError, unavailable
from ..api.keys import KeyRing
from ..api.requests import Work, check_request
from .engine import Engine
from .queue import Job
from .settings import Settings
from .telemetry import Record, record_of

# Below this many bytes of arrays, writing takes less time than switching to another thread.
_SMALL = 1 << 16


@dataclass(frozen=True)
class Actions:
    """The ASGI application behind `/api/v3/{slug}/{action}`."""

    catalog: Catalog
    keys: KeyRing
    engine: Engine
    settings: Settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        due = time.monotonic() + self.settings.deadline
        request, record = Request(scope, receive), record_of(scope)
        work = await self._read(request, record)
        job = self.engine.submit(work, record.client)
        gone = asyncio.create_task(_hang_up(receive, job))
        try:
            await self._wait(job, due)
            await _send_results(request, job, gone, send)
        finally:
            gone.cancel()
            record.facts |= job.times()
            self.engine.release(job)

    async def _read(self, request: Request, record: Record) -> Work:
        """Check the client and the request, cheapest checks first; read the body last."""
        headers = request.headers
        authorization = ", ".join(headers.getlist("authorization")).encode("latin-1")
        record.client = self.keys.identify(authorization) or record.client
        slug, action = request.path_params["slug"], request.path_params["action"]
        served = self.catalog.find(slug, action)
        record.route, record.slug = action, slug
        self.engine.check_place(record.client)
        gzipped = check_media(headers.get("content-type"), headers.get("content-encoding"))
        body = await self._read_body(request)
        if gzipped:
            body = gunzip(body, self.settings.max_decompressed)
        work = check_request(served, action, parse_json(body))
        record.facts |= {"slug": slug, "action": action, "items": len(work.tokens), "residues": sum(work.lengths)}
        return work

    async def _read_body(self, request: Request) -> bytes:
        """Read a body; ApiError 413 as soon as it is known to be too large, 408 if it does not arrive in time."""
        length, limit = request.headers.get("content-length", ""), self.settings.max_body
        if length.isdecimal() and int(length[:16]) > limit:
            raise too_large(limit)

        async def read() -> bytes:
            body = bytearray()
            async for piece in request.stream():
                body += piece
                if len(body) > limit:
                    raise too_large(limit)
            return bytes(body)

        try:
            return await asyncio.wait_for(read(), self.settings.body_timeout)
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {self.settings.body_timeout:g} seconds"
            raise ApiError(408, message, headers={"Connection": "close"}) from None

    async def _wait(self, job: Job, due: float) -> None:
        """Wait for the results of a job; ApiError 503 if they are not there in time."""
        try:
            await asyncio.wait_for(job.done, due - time.monotonic())
        except asyncio.TimeoutError:
            message = f"no result within {self.settings.deadline:g} seconds"
            raise unavailable("deadline", message, self.engine.retry_after()) from None


async def _send_results(request: Request, job: Job, gone: asyncio.Task[None], send: Send) -> None:
    """Send small results at once, large ones piece by piece from a thread."""
    accept, encodings = (", ".join(request.headers.getlist(name)) for name in ("accept", "accept-encoding"))
    form = AnswerForm.chosen(accept, encodings)
    pieces, headers = form.write(job.results), form.headers | job.work.served.headers
    if job.memory <= _SMALL:
        response = Response(b"".join(pieces), headers=headers)
        await response(request.scope, request.receive, send)
        return
    # The first piece comes before the status, so that a failure can still be reported.
    piece: bytes | None = await asyncio.to_thread(next, pieces, None)
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
    while piece is not None:
        if gone.done():
            raise ClientDisconnect
        await send({"type": "http.response.body", "body": piece, "more_body": True})
        piece = await asyncio.to_thread(next, pieces, None)
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _hang_up(receive: Receive, job: Job) -> None:
    """End the job, and this task, when the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    if not job.done.done():
        job.done.set_exception(ClientDisconnect())
