"""The service's parts, without a network: who is next, what may start, and what is answered when something fails."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any, cast

import numpy as np
import pytest

pytest.importorskip("starlette")

from numpyesm.alphabet import TOKEN_ID
from numpyesm.api.catalog import Catalog
from numpyesm.api.requests import Work, check_request
from numpyesm.config import ModelConfig
from numpyesm.model import ESM2
from numpyesm.passes import Passes
from numpyesm.service.access_log import AccessLog
from numpyesm.service.app import Service
from numpyesm.service.jobs import Job
from numpyesm.service.queue import FairQueue
from numpyesm.service.settings import Settings
from numpyesm.weights.synthetic import random_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")
GOOD = {"items": [{"sequence": "MKT"}]}
ENCODE = "/api/v3/esm2-35m/encode/"
ROWS = 100

# -- the queue ---------------------------------------------------------------------------------------------------------


def job(client: str, lengths: list[int], group: str = "mean") -> Job:
    """A job whose sequences take as many rows as said."""
    tokens = tuple(np.zeros(length, np.uint8) for length in lengths)
    work = Work(cast(Any, "a model"), "predict", tokens, positions=group)
    return Job(work, client, 0, cast(Any, None))


def queue_of(*jobs: Job) -> FairQueue:
    queue = FairQueue()
    for one in jobs:
        queue.put(one)
    return queue


def take(queue: FairQueue) -> list[tuple[Job, int]]:
    return queue.take(ROWS, lambda _: True)


def served(queue: FairQueue) -> list[list[str]]:
    """Clients of each pass until the queue is empty."""
    passes = []
    while len(queue):
        passes.append([one.client for one, _ in take(queue)])
    return passes


@pytest.mark.parametrize(
    ("jobs", "passes"),
    [
        # Small jobs share a pass, up to its rows.
        ([(f"c{i}", [30]) for i in range(5)], [["c0", "c1", "c2"], ["c3", "c4"]]),
        # Clients take turns, whatever they send; turns are by rows, not by requests.
        ([("greedy", [100])] * 3 + [("modest", [100])], [["greedy"], ["modest"], ["greedy"], ["greedy"]]),
        ([("long", [100])] * 2 + [("short", [10])] * 11, [["long"], ["short"] * 10, ["long"], ["short"]]),
        # Groups do not mix.
        ([("a", [10], "mean"), ("b", [10], "contacts"), ("c", [10], "mean")], [["a", "c"], ["b"]]),
        # A long sequence goes alone.
        ([("c", [500]), ("c", [10])], [["c"], ["c"]]),
    ],
)
def test_passes(jobs: list[Any], passes: list[list[str]]) -> None:
    assert served(queue_of(*(job(*one) for one in jobs))) == passes


def test_who_comes_back_has_no_credit() -> None:
    queue = queue_of(*(job("steady", [100]) for _ in range(5)))
    for _ in range(3):
        take(queue)
    queue.put(job("late", [100]))
    queue.put(job("late", [100]))
    assert served(queue) in ([["steady"], ["late"], ["steady"], ["late"]], [["late"], ["steady"], ["late"], ["steady"]])


def test_a_job_of_many_passes_lets_short_ones_of_its_client_through() -> None:
    large, other_large, small = job("one", [100] * 4), job("one", [100] * 3), job("one", [10], "contacts")
    queue = queue_of(large, other_large, small)
    assert take(queue) == [(large, 0)]
    assert take(queue) == [(small, 0)]
    late = job("one", [10], "contacts")
    assert take(queue) == [(large, 1)]
    queue.put(late)
    assert [take(queue) for _ in range(4)] == [[(large, 2)], [(late, 0)], [(large, 3)], [(other_large, 0)]]


def test_what_does_not_fit_the_memory_waits() -> None:
    large, small = job("a", [10]), job("b", [10])
    queue = queue_of(large, small)
    assert queue.take(ROWS, lambda one: one is small) == [(small, 0)]
    assert list(queue) == [large]


# -- the whole, without a network --------------------------------------------------------------------------------------


class Inside:
    """A service whose application is called directly, in the event loop of the test."""

    def __init__(self, **settings: Any) -> None:
        model = ESM2(random_checkpoint(ModelConfig(2, 32, 4, 64), 1), backend="numpy", threads=1)
        catalog = Catalog({"esm2-35m": model})
        self.lines = io.StringIO()
        self.service = Service(catalog, settings=Settings(**settings), access_log=AccessLog(self.lines))
        self.engine, self.gate = self.service.engine, self.service.gate

    def run(self, test: Callable[[], Awaitable[None]]) -> None:
        """Run a test while the service runs."""

        async def running() -> None:
            self.service.prepare()
            async with self.service.lifespan(None):
                await asyncio.wait_for(test(), 60)

        asyncio.run(running())

    async def call(self, method: str, path: str, document: Any = None, stuck: bool = False) -> tuple[int, Any]:
        """Status and document of one request; `stuck` is a client that takes nothing after the answer's head."""
        body = json.dumps(document).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "server": ("x", 80),
            "client": ("127.0.0.1", 1), "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        sent: list[Any] = []

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.sleep(3600)

        async def send(message: Any) -> None:
            if stuck and message["type"] == "http.response.body":
                await asyncio.sleep(3600)
            sent.append(message)

        await self.gate(scope, receive, send)
        content = b"".join(message.get("body", b"") for message in sent[1:])
        return sent[0]["status"], json.loads(content) if content else None


class HeldPasses:
    """Passes wait until they are let go; `spoil` gets the tokens and the results of each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Any, Any], None] = lambda *_: None) -> None:
        self._begun, self.go = threading.Semaphore(0), threading.Event()
        real = Passes.encode

        def encode(passes: Passes, tokens: Any, outputs: Any) -> Any:
            self._begun.release()
            assert self.go.wait(60)
            results = list(real(passes, tokens, outputs))
            spoil(tokens, results)
            return results

        monkeypatch.setattr(Passes, "encode", encode)

    async def wait(self) -> None:
        """Until a pass has begun."""
        assert await asyncio.get_running_loop().run_in_executor(None, self._begun.acquire, True, 60)


def no_memory(tokens: Any, results: Any) -> None:
    """Fail if WWW is in the pass."""
    if any((ids[1:-1] == TOKEN_ID["W"]).all() for ids in tokens):
        raise MemoryError


def not_finite(tokens: Any, results: Any) -> None:
    """Give WWW an embedding that is no number."""
    for ids, result in zip(tokens, results, strict=True):
        if (ids[1:-1] == TOKEN_ID["W"]).all():
            result.embeddings[2][7] = np.nan


@pytest.mark.parametrize(
    ("spoil", "status", "code"), [(no_memory, 503, "server.memory"), (not_finite, 500, "server.not_finite")]
)
def test_no_request_suffers_from_another_in_its_pass(
    monkeypatch: pytest.MonkeyPatch, spoil: Any, status: int, code: str
) -> None:
    inside = Inside()

    async def test() -> None:
        held = HeldPasses(monkeypatch, spoil)
        calls = [asyncio.create_task(inside.call("POST", ENCODE, GOOD))]
        await held.wait()  # while this one is in the engine, the others gather
        for sequence in ("MKT", "WWW", "MKV"):
            document = {"items": [{"sequence": sequence}]}
            calls.append(asyncio.create_task(inside.call("POST", ENCODE, document)))
        while inside.engine.waiting < 3:
            await asyncio.sleep(0)
        held.go.set()
        answers = await asyncio.gather(*calls)
        assert [answer[0] for answer in answers] == [200, 200, status, 200]
        assert answers[2][1]["code"] == code
        assert inside.engine.admission.held == 0

    inside.run(test)


def test_a_client_that_takes_nothing_frees_its_place() -> None:
    inside = Inside(write_timeout=0.2)

    async def test() -> None:
        large = {"params": {"include": ["per_token"]}, "items": [{"sequence": "M" * 2000}]}
        for method, path, document in (("POST", ENCODE, GOOD), ("POST", ENCODE, large), ("GET", "/openapi.json", None)):
            await inside.call(method, path, document, stuck=True)
            assert inside.engine.admission.held == 0
            assert inside.gate.active == 0

    inside.run(test)
    assert [json.loads(line)["status"] for line in inside.lines.getvalue().splitlines()] == [499, 499, 499]


def test_an_engine_that_stops_tells_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = Inside()

    async def test() -> None:
        held = HeldPasses(monkeypatch)
        assert await inside.call("GET", "/healthz") == (200, {"status": "ok"})
        running = asyncio.create_task(inside.call("POST", ENCODE, GOOD))
        await held.wait()
        waiting = asyncio.create_task(inside.call("POST", ENCODE, GOOD))
        while not inside.engine.waiting:
            await asyncio.sleep(0)
        inside.engine.abandon()
        for call in (running, waiting):
            status, document = await call
            assert (status, document["code"]) == (503, "server.draining")
        held.go.set()
        await inside.engine.stop()
        inside.engine.draining = False
        for method, path in (("GET", "/healthz"), ("GET", "/readyz"), ("POST", ENCODE)):
            status, document = await inside.call(method, path, GOOD)
            assert (status, document["code"]) == (503, "server.not_ready"), path

    inside.run(test)


def test_a_request_that_joins_others_keeps_what_it_needs_alone() -> None:
    """What is held by other answers and what this one needs must fit together; sending takes memory too."""
    inside = Inside()
    admission, served = inside.engine.admission, inside.service.catalog.get("esm2-35m")
    work = check_request(served, "encode", {"params": {"include": ["per_token"]}, "items": [{"sequence": "M" * 100}]})
    one = Job(work, "x", admission.check(work), cast(Any, None))
    admission.held = 1000
    admission.limit = admission.need(work) + 999
    assert not admission.admit(one)
    admission.limit += 1
    assert admission.admit(one)
    admission.release(one)
    assert admission.held == 1000
    admission.held, admission.limit = 0, 1  # alone it may always start
    assert admission.admit(one)
