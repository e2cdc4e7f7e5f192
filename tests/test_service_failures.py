"""What the service answers when something in it fails, by calling the application itself."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from numpyesm.config import ModelConfig
from numpyesm.model import ESM2
from numpyesm.service.access_log import AccessLog
from numpyesm.service.app import Service
from numpyesm.service.auth import read_keys
from numpyesm.service.catalog import Catalog
from numpyesm.service.errors import ApiError
from numpyesm.service.jobs import Work
from numpyesm.service.settings import Settings
from numpyesm.weights.synthetic import random_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")
GOOD = {"items": [{"sequence": "MKT"}]}


@pytest.fixture
def service() -> Iterator[Service]:
    model = ESM2(random_checkpoint(ModelConfig(2, 40, 4, 80), 1), backend="numpy", threads=1)
    made = Service(
        Catalog({"esm2-35m": model}), settings=Settings(write_timeout=0.2), access_log=AccessLog(io.StringIO())
    )
    made.engine.start()
    yield made
    made.engine.stop()


def call(service: Service, method: str, path: str, document: Any = None, stuck: bool = False) -> tuple[int, bytes]:
    """Status and body of one request; `stuck` is a client that takes nothing after the head of the answer."""
    body = json.dumps(document).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80), "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        if stuck and message["type"] == "http.response.body":
            await asyncio.sleep(3600)
        sent.append(message)

    asyncio.run(asyncio.wait_for(service.gate(scope, receive, send), 60))
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])


def test_a_failure_inside_has_the_one_shape(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(client: str) -> None:
        raise ValueError("a secret of the inside")

    monkeypatch.setattr(service.engine, "check_room", fail)
    status, body = call(service, "POST", "/api/v3/esm2-35m/encode/", GOOD)
    document = json.loads(body)
    assert (status, document["status_code"], document["code"]) == (500, 500, "server.internal")
    assert set(document) == {"detail", "errors", "status_code", "code", "error"}
    assert b"secret" not in body


def test_a_client_that_takes_nothing_frees_its_place(service: Service) -> None:
    for document in (GOOD, {"params": {"include": ["per_token"]}, "items": [{"sequence": "M" * 2000}]}):
        call(service, "POST", "/api/v3/esm2-35m/encode", document, stuck=True)
        assert service.engine.budget.held == 0
        assert service.gate.active == 0
    call(service, "GET", "/openapi.json", stuck=True)
    assert service.gate.active == 0


def test_a_dead_engine_is_told_in_the_one_shape(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(service, "GET", "/healthz") == (200, b'{"status":"ok"}')
    service.engine.stop()
    service.engine.draining = False
    for method, path in (("GET", "/healthz"), ("GET", "/readyz"), ("POST", "/api/v3/esm2-35m/encode")):
        status, body = call(service, method, path, GOOD)
        assert (status, json.loads(body)["code"]) == (503, "server.not_ready"), path


def test_retry_after_may_be_asked_while_the_engine_takes_jobs(service: Service) -> None:
    with service.engine._wake:
        assert service.engine.retry_after() >= 1


def test_every_item_is_named_however_many_problems_another_has() -> None:
    problems: list[Any] = [(("params", "repr_layers", i), "no such layer") for i in range(256)]
    problems += [(("items", 0, f"x{i}"), "unknown") for i in range(70)]
    problems += [(("items", i, "sequence"), "wrong") for i in range(1, 8)]
    document = json.loads(ApiError(422, "x", problems=problems).body())
    assert len(document["errors"]) == 64
    assert {f"items__{i}__sequence" for i in range(1, 8)} | {"items__0__x0"} <= set(document["error"])


def test_a_request_that_joins_others_keeps_what_it_needs_alone(service: Service) -> None:
    """What is held by other answers and what this one needs must fit together; sending takes memory too."""
    served, budget = service.catalog.find("esm2-35m", "encode"), service.engine.budget
    work = Work(served, "encode", ("M" * 100,), (2,), frozenset({"per_token"}))
    memory = service.engine.estimate(work)
    budget.held = 1000
    budget.limit = budget.need(work) + 1000
    assert budget.fits(work, memory)
    budget.limit -= 1
    assert not budget.fits(work, memory)
    budget.held = 0
    assert budget.fits(work, memory)


def test_a_key_file_may_begin_with_a_byte_order_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMPYESM_API_KEYS", raising=False)
    (tmp_path / "keys.txt").write_bytes(b"\xef\xbb\xbfsecret-key-1\nsecret-key-2\n")
    assert read_keys(tmp_path / "keys.txt") == ["secret-key-1", "secret-key-2"]
