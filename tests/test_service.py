"""The HTTP service: fairness, memory, what takes too long or fails; over a socket: pages, log, hostile connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import requests
from running_service import ENCODE, GOOD, HEAD, ServiceHere, check_error, items, receive_all

from numpyesm import ESM2
from numpyesm.alphabet import TOKEN_ID
from numpyesm.api.requests import Work
from numpyesm.passes import Passes
from numpyesm.service.queue import Admission, FairQueue, Job

ROWS = 100


def job(client: str, lengths: list[int], group: str = "mean", memory: int = 0) -> Job:
    """A job whose sequences take as many rows as said."""
    tokens = tuple(np.zeros(length, np.uint8) for length in lengths)
    work = Work(cast(Any, "a model"), "predict", tokens, positions=group)
    return Job(work, client, memory, cast(Any, None))


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


@pytest.fixture
def admission(monkeypatch: pytest.MonkeyPatch) -> Admission:
    """Of 1000 bytes; alone, a job needs 100 and those of its results."""
    monkeypatch.setattr(Admission, "need", lambda _, work: 100 + len(work.tokens[0]))
    admission = Admission(1000, ROWS)
    admission.limit = 1000
    return admission


def test_a_request_that_joins_others_keeps_what_it_needs_alone(admission: Admission) -> None:
    """What is held by other answers and what this one needs must fit together; sending takes memory too."""
    one = job("a", [50], memory=50)
    admission.held = 851
    assert not admission.admit(one)
    admission.held = 850
    assert admission.admit(one)
    assert admission.held == 900
    admission.release(one)
    assert admission.held == 850
    admission.held, admission.limit = 0, 1  # alone it may always start
    assert admission.admit(one)


def test_only_small_jobs_overtake_one_that_waits_for_memory(admission: Admission) -> None:
    waits, large, small = job("a", [600], memory=600), job("b", [20], memory=20), job("c", [1], memory=1)
    admission.held = 400
    assert [admission.admit(one) for one in (waits, large, small)] == [False, False, True]
    admission.held = 100
    assert [admission.admit(one) for one in (waits, large)] == [True, True]


TWO_PASSES = {"items": items("M" * 2000, "M" * 2000)}


class Held(ServiceHere):
    """A service whose passes wait until they are let go; there is no memory for WWW."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.engine = self.service.engine
        self.go = threading.Event()
        self._pool = ThreadPoolExecutor(16)
        real = Passes.encode

        def encode(passes: Passes, tokens: Any, outputs: Any) -> Any:
            assert self.go.wait(60)
            if any((ids[1:-1] == TOKEN_ID["W"]).all() for ids in tokens):
                raise MemoryError
            return real(passes, tokens, outputs)

        monkeypatch.setattr(Passes, "encode", encode)

    def __exit__(self, *_: object) -> None:
        self.go.set()
        super().__exit__()

    def ask(self, document: Any = GOOD, key: str = "") -> Future[requests.Response]:
        """Ask in another thread."""
        return self._pool.submit(self.post, ENCODE, document, headers={"Authorization": f"Token {key}"})

    def first(self, document: Any = GOOD, key: str = "") -> Future[requests.Response]:
        """Ask, and wait until the engine has begun."""
        answer = self.ask(document, key)
        self.wait_until(lambda: self.engine.admission.held)
        return answer

    def wait(self, waiting: int) -> None:
        """Until so many requests wait."""
        self.wait_until(lambda: self.engine.waiting == waiting)

    def check_idle(self) -> None:
        """Nothing is held when all is done."""
        gate, engine = self.service.gate, self.engine
        self.wait_until(lambda: (gate.active, engine.waiting, engine.admission.held) == (0, 0, 0))


@pytest.fixture
def hold(model: ESM2, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Held]]:
    """Starts a service whose passes wait."""
    with contextlib.ExitStack() as stack:
        yield lambda *keys, **settings: stack.enter_context(Held(monkeypatch, {"esm2-35m": model}, keys, **settings))


def refused(answer: requests.Response, status: int, code: str) -> None:
    assert check_error(answer, status)["code"] == code
    assert int(answer.headers["retry-after"]) >= 1


def test_no_request_suffers_from_another_in_its_pass(hold: Any) -> None:
    held = hold()
    answers = [held.first()]  # while this one is in the engine, the others gather
    answers += [held.ask({"items": items(sequence)}) for sequence in ("MKT", "WWW", "MKV")]
    held.wait(3)
    held.go.set()
    refused(answers.pop(2).result(60), 503, "server.memory")
    assert [answer.result(60).status_code for answer in answers] == [200, 200, 200]
    held.check_idle()


def test_who_hangs_up_frees_its_place(hold: Any) -> None:
    held = hold()
    answer = held.first(TWO_PASSES)
    assert held.get("/healthz").status_code == 200
    body = json.dumps(TWO_PASSES)
    connections = [held.connect() for _ in range(5)]
    for connection in connections:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    held.wait(6)
    for connection in connections:
        connection.close()
    with held.connect() as connection:  # half a body, and gone
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    # The log is written by a thread of its own, after the counter.
    held.wait_until(lambda: [entry["status"] for entry in held.entries()].count(499) == 6)
    assert held.metric("numpyesm_hang_ups_total") == 6
    held.wait(1)
    held.go.set()
    assert answer.result(60).status_code == 200
    held.check_idle()


def test_share_of_the_queue(hold: Any) -> None:
    """One client fills its share and gets 429; another still gets in, until the queue itself is full: 503."""
    held = hold("aaa", "bbb", "ccc", queue_size=4)
    answers = [held.first(key="aaa")]
    for waiting, key in enumerate(["aaa", "aaa", "aaa", "bbb"], start=1):
        answers.append(held.ask(key=key))
        held.wait(waiting)
    refused(held.ask(key="aaa").result(60), 429, "user.rate")
    refused(held.ask(key="ccc").result(60), 503, "server.queue_full")
    held.go.set()
    assert [one.result(60).status_code for one in answers] == [200] * 5
    held.check_idle()


def test_deadline(hold: Any) -> None:
    """Of what is being computed, and of what waits."""
    held = hold(deadline=0.2)
    for answer in [held.ask(), held.ask()]:
        refused(answer.result(60), 503, "server.deadline")
    held.go.set()
    held.check_idle()


@pytest.mark.slow
@pytest.mark.parametrize(("grace", "signals"), [(0.2, 1), (300, 2)])
def test_who_waits_is_told_when_time_is_up(hold: Any, grace: float, signals: int) -> None:
    """The grace ends, or there is a second signal."""
    held = hold(grace=grace)
    answers = [held.first(TWO_PASSES), held.ask(), held.ask()]
    held.wait(3)
    for _ in range(signals):
        held.signal()
    for answer in answers:
        assert check_error(answer.result(60), 503)["code"] == "server.draining"
    held.go.set()
    held.thread.join(60)
    assert not held.thread.is_alive()


def test_an_engine_that_has_stopped_says_so(hold: Any) -> None:
    service = hold()
    asyncio.run_coroutine_threadsafe(service.service.engine.stop(), service.loop).result(60)
    for answer in (service.get("/healthz"), service.get("/readyz"), service.post(ENCODE, GOOD)):
        assert check_error(answer, 503)["code"] == "server.not_ready"


# -- over a socket ----------------------------------------------------------------------------------------------------

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def one_service(model: ESM2) -> Iterator[ServiceHere]:
    limits = {"head_timeout": 0.5, "body_timeout": 0.5, "write_timeout": 0.5}
    with ServiceHere({"esm2-35m": model}, allowed_hosts=("proteins.example",), **limits) as running:
        yield running


@pytest.fixture
def service(one_service: ServiceHere) -> Iterator[ServiceHere]:
    """It lives on after every test."""
    yield one_service
    assert one_service.post(ENCODE, GOOD).status_code == 200


def test_pages(service: ServiceHere) -> None:
    page = service.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self';" in policy
    assert not re.search("unsafe|http", policy)
    assert service.get("/", headers={"If-None-Match": page.headers["etag"]}).status_code == 304
    docs = service.get("/docs")
    assert docs.headers["content-security-policy"] == policy
    for path in service.get("/openapi.json").json()["paths"]:
        assert path.rstrip("/") in docs.text
    assert service.get("/page/main.js").headers["content-type"].startswith("text/javascript")
    head = requests.head(f"{service.url}/healthz", timeout=60)
    assert (head.status_code, head.content) == (200, b"")
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/", "/page/nothing.js", "/nowhere"):
        prepared = requests.Request("GET", service.url).prepare()
        prepared.url = service.url + path  # `..` and all
        check_error(requests.Session().send(prepared, timeout=60), 404)


def test_log_line_and_metrics(service: ServiceHere) -> None:
    response = service.post(ENCODE, GOOD, headers={"X-Request-ID": "mine-1"})
    assert (response.headers["x-request-id"], response.headers["cache-control"]) == ("mine-1", "no-store")
    assert "synthetic" in response.headers["x-numpyesm-weights"]
    bad = service.post(ENCODE, GOOD, headers={"X-Request-ID": "no blanks\tplease"})
    assert bad.headers["x-request-id"] != "no blanks\tplease"
    service.post("made-up-slug/encode", GOOD)
    service.get("/healthz?token=secret", headers={"X-Request-ID": "mine-2"})
    service.wait_until(lambda: any(entry["id"] == "mine-2" for entry in service.entries()))
    entry = next(entry for entry in service.entries() if entry["id"] == "mine-1")
    assert (entry["status"], entry["slug"], entry["action"], entry["items"]) == (200, "esm2-35m", "encode", 1)
    assert (entry["residues"], entry["client"]) == (3, "127.0.0.1")
    assert {"ms", "bytes", "queue_ms", "compute_ms"} <= set(entry)
    assert "secret" not in service.log()
    text = service.get("/metrics").text
    assert 'numpyesm_requests_total{route="encode",slug="esm2-35m",status="200"}' in text
    assert "numpyesm_queue_length 0.0" in text
    assert "made-up-slug" not in text


@pytest.mark.slow
@pytest.mark.parametrize("phases", ["examples,fuzzing", "coverage --include-operation-id predict"])
def test_schemathesis(service: ServiceHere, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phases: str) -> None:
    """All its checks: status codes, answers' schemas, refusal of bad data, acceptance of good, wrong methods."""
    from click.testing import CliRunner
    from schemathesis.cli import schemathesis

    monkeypatch.chdir(tmp_path)
    command = ["run", f"{service.url}/openapi.json", "--checks", "all", "--max-examples", "4", "--seed", "1"]
    command += ["--suppress-health-check", "all", "--no-color", "--phases", *phases.split()]
    done = CliRunner().invoke(schemathesis, command)
    assert done.exit_code == 0, done.output[-5000:]


@pytest.mark.slow
def test_dns_rebinding(service: ServiceHere) -> None:
    ours = ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.9.9.9:80", "[::1]:8000", "proteins.example"]
    others = ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "", "@localhost"]
    for host in ours:
        assert service.post(ENCODE, GOOD, headers={"Host": host}).status_code == 200, host
    for host in others:
        check_error(service.post(ENCODE, GOOD, headers={"Host": host}), 403)


def test_too_many_connections_are_refused(loaded: ESM2) -> None:
    with ServiceHere({"esm2-35m": loaded}, max_connections=2) as service, contextlib.ExitStack() as stack:
        *_, third = [stack.enter_context(service.connect()) for _ in range(3)]
        assert receive_all(third).startswith(b"HTTP/1.1 503")


def test_large_bodies(service: ServiceHere) -> None:
    large = json.dumps(GOOD).encode() + b" " * 2**20
    check_error(service.post(ENCODE, data=iter([large[:1000], large[1000:]]), headers=JSON), 413)  # chunked
    assert service.post(ENCODE, data=large[: 2**20], headers=JSON).status_code == 200
    assert service.post(ENCODE, data=iter([large[:1000], large[1000 : 2**20]]), headers=JSON).status_code == 200


@pytest.mark.parametrize("first_line", [HEAD.splitlines()[0], "GET /healthz HTTP/1.1"])
def test_endless_rest_of_a_body_that_nobody_reads(service: ServiceHere, first_line: str) -> None:
    """The client is told, and cut off when it goes on."""
    with service.connect() as connection:
        connection.sendall(f"{first_line}\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n".encode())
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 10**9:
                sent += connection.send(b"x" * 65536)
        assert sent < 10**8


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_refusal_reaches_a_client_that_closes_after_it(service: ServiceHere, version: str) -> None:
    """urllib and proxies send everything and only then read: a connection closed meanwhile is an error to them."""
    large = b"x" * 5_000_000
    first_line = f"POST /api/v3/esm2-35m/encode HTTP/{version}\r\nHost: localhost\r\nConnection: TE, Close\r\n"
    with service.connect() as connection:
        head = f"{first_line}Content-Type: application/json\r\nContent-Length: {len(large)}\r\n\r\n"
        connection.sendall(head.encode() + large)
        assert receive_all(connection).startswith(b"HTTP/1.1 413")
    with service.connect() as connection:  # refused before the body begins
        connection.sendall(f"{first_line}Content-Length: 2000\r\n\r\n".encode())
        answer = connection.recv(65536)
        for _ in range(20):
            connection.sendall(b"x" * 100)
        assert (answer + receive_all(connection)).startswith(b"HTTP/1.1 415")


def test_a_head_that_trickles(service: ServiceHere) -> None:
    with service.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        while not select.select([connection], [], [], 0.05)[0]:
            connection.sendall(b"X: 1\r\n")
        assert connection.recv(1024).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_a_client_that_does_not_read(service: ServiceHere) -> None:
    """It is cut off, and its memory is free again."""
    params = {"include": ["per_token"], "repr_layers": [0, 1, 2, 3]}
    body = json.dumps({"params": params, "items": items("A" * 2000, "A" * 2000)})
    with service.connect() as connection:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        service.wait_until(lambda: any(e.get("reason") == "the client does not read" for e in service.entries()))
        whole = 2 * 4 * 2000 * 80 * 6  # bytes at least
        assert len(receive_all(connection)) < whole
    assert service.metric("numpyesm_result_bytes") == 0
    service.wait_until(lambda: service.service.gate.active == 0)


BODY = json.dumps(GOOD)
CHUNKED = f"{len(BODY):x}\r\n{BODY}\r\n0\r\n\r\n"
LENGTHS = [f"Content-Length: {len(CHUNKED)}", "Transfer-Encoding: chunked"]
HEALTH = "GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
NOWHERE = "POST /nowhere HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("status", "sent"),
    [
        # No HTTP.
        (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50),
        (400, b"G\xffT / HTTP/1.1\r\nHost: x\r\n\r\n"),
        (400, f"{HEALTH}Content-Length: 1\r\nContent-Length: 2\r\n\r\n"),
        (400, f"{HEALTH}X: " + "x" * 200_000),
        (400, f"{HEALTH}Content-Length: -1\r\n\r\n"),
        # Two lengths close the connection: a proxy that believes the other one takes the rest for another's request.
        *((400, f"{HEAD}{a}\r\n{b}\r\n\r\n{CHUNKED}{HEALTH}\r\n") for a, b in (LENGTHS, LENGTHS[::-1])),
        # Who says that a body is too large, or asks before sending it, is answered at once.
        *((413, f"{HEAD}Content-Length: {length}\r\n\r\n") for length in ("999999999999", "1048577")),
        (404, f"{NOWHERE}Connection: close\r\nExpect: 100-continue\r\nContent-Length: 2000\r\n\r\n"),
        # What does not come in time: a head, half a head, a body, a second head on the same connection.
        (408, ""),
        (408, HEAD[:60]),
        (408, f"{HEAD}Content-Length: 100\r\n\r\n{{"),
        (408, f"{HEALTH}\r\n{HEALTH}"),
    ],
)
@pytest.mark.slow
def test_what_is_refused_is_said_and_logged(service: ServiceHere, status: int, sent: str | bytes) -> None:
    with service.connect() as connection:
        connection.sendall(sent if isinstance(sent, bytes) else sent.encode())
        answer = receive_all(connection)
    head, _, body = answer[answer.rindex(b"HTTP/1.1 ") :].partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert json.loads(body)["status_code"] == status
    request_id = re.search(r"x-request-id: (\w+)", head.decode())
    assert request_id is not None
    told = (request_id[1], status)
    service.wait_until(lambda: any((entry["id"], entry["status"]) == told for entry in service.entries()))
