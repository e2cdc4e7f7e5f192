"""Fairness and memory: who is next, what may start, and what is answered when it takes too long or something fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
import requests
from running_service import ENCODE, GOOD, HEAD, ServiceHere, check_error, items

pytest.importorskip("starlette")

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


class Held:
    """A service whose passes wait until they are let go; there is no memory for WWW."""

    def __init__(self, service: ServiceHere, monkeypatch: pytest.MonkeyPatch) -> None:
        self.service, self.engine = service, service.service.engine
        self.go = threading.Event()
        self._begun = threading.Semaphore(0)
        self._pool = ThreadPoolExecutor(16)
        real = Passes.encode

        def encode(passes: Passes, tokens: Any, outputs: Any) -> Any:
            self._begun.release()
            assert self.go.wait(60)
            if any((ids[1:-1] == TOKEN_ID["W"]).all() for ids in tokens):
                raise MemoryError
            return real(passes, tokens, outputs)

        monkeypatch.setattr(Passes, "encode", encode)

    def ask(self, document: Any = GOOD, key: str = "") -> Future[requests.Response]:
        """Ask in another thread."""
        return self._pool.submit(self.service.post, ENCODE, document, headers={"Authorization": f"Token {key}"})

    def first(self, document: Any = GOOD, key: str = "") -> Future[requests.Response]:
        """Ask, and wait until the engine has begun."""
        answer = self.ask(document, key)
        assert self._begun.acquire(timeout=60)
        return answer

    def wait(self, waiting: int) -> None:
        """Until so many requests wait."""
        self.service.wait_until(lambda: self.engine.waiting == waiting)

    def check_idle(self) -> None:
        """Nothing is held when all is done."""
        gate, engine = self.service.service.gate, self.engine
        self.service.wait_until(lambda: (gate.active, engine.waiting, engine.admission.held) == (0, 0, 0))


@pytest.fixture
def hold(model: ESM2, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Held]]:
    """Starts a service whose passes wait."""
    with contextlib.ExitStack() as stack:

        def start(*keys: str, **settings: Any) -> Held:
            held = Held(stack.enter_context(ServiceHere({"esm2-35m": model}, keys, **settings)), monkeypatch)
            stack.callback(held.go.set)
            return held

        yield start


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
    assert held.service.get("/healthz").status_code == 200
    body = json.dumps(TWO_PASSES)
    connections = [held.service.connect() for _ in range(5)]
    for connection in connections:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    held.wait(6)
    for connection in connections:
        connection.close()
    with held.service.connect() as connection:  # half a body, and gone
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    held.service.wait_until(lambda: held.service.metric("numpyesm_hang_ups_total") == 6)
    held.wait(1)
    assert [entry["status"] for entry in held.service.entries()].count(499) == 6
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
        held.service.signal()
    for answer in answers:
        assert check_error(answer.result(60), 503)["code"] == "server.draining"
    held.go.set()
    held.service.thread.join(60)
    assert not held.service.thread.is_alive()


def test_an_engine_that_has_stopped_says_so(hold: Any) -> None:
    service = hold().service
    asyncio.run_coroutine_threadsafe(service.service.engine.stop(), service.loop).result(60)
    for answer in (service.get("/healthz"), service.get("/readyz"), service.post(ENCODE, GOOD)):
        assert check_error(answer, 503)["code"] == "server.not_ready"
