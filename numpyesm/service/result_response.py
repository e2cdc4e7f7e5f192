"""Sends results: small ones at once, large ones piece by piece from a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

from starlette.types import Receive, Scope, Send

from ..api.media import GZIP_FROM, JSON_TYPE
from ..formats import Result, gzip_pieces, json_results, npz_results
from .gate import record_of, send_bytes

# Below this many bytes of arrays, writing takes less time than going to another thread.
_SMALL = 1 << 16


class ResultResponse:
    """An ASGI response.

    Parameters
    ----------
    results : sequence of results
        Given up as soon as they are sent.
    form : str
        Media type.
    gzipped : bool
    size : int
        Bytes of the arrays.
    gone : Task
        Done when the client hangs up.
    release : callable
        Called once, when the answer is sent or given up.
    threads : Executor
        Where large answers are written.
    """

    def __init__(
        self,
        results: Sequence[Result],
        *,
        form: str,
        gzipped: bool,
        size: int,
        gone: asyncio.Task[None],
        release: Callable[[], None],
        threads: Executor,
    ) -> None:
        self._pieces: Iterator[bytes] = json_results(results) if form == JSON_TYPE else npz_results(results)
        self._headers = [(b"content-type", form.encode()), (b"vary", b"Accept, Accept-Encoding")]
        self._gzipped = gzipped and form == JSON_TYPE  # numbers as they lie in memory do not shrink
        self._size = size
        self._gone = gone
        self._release = release
        self._threads = threads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self._size <= _SMALL:
                await self._send_whole(send)
            else:
                await self._send_pieces(scope, send)
        finally:
            self._pieces = iter(())
            self._gone.cancel()
            self._release()

    async def _send_whole(self, send: Send) -> None:
        content = b"".join(self._pieces)
        if self._gzipped and len(content) >= GZIP_FROM:
            content = b"".join(gzip_pieces([content]))
            self._headers.append((b"content-encoding", b"gzip"))
        await send_bytes(send, 200, content, self._headers)

    async def _send_pieces(self, scope: Scope, send: Send) -> None:
        loop = asyncio.get_running_loop()
        pieces = self._pieces
        if self._gzipped:
            pieces = gzip_pieces(pieces)
            self._headers.append((b"content-encoding", b"gzip"))
        # The first piece before the status: a failure can then still be told.
        piece: bytes | None = await loop.run_in_executor(self._threads, next, pieces, None)
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        while piece is not None:
            if self._gone.done():
                record_of(scope).hung_up = True
                return
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            piece = await loop.run_in_executor(self._threads, next, pieces, None)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
