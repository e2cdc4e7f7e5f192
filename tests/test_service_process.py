"""The service as a process: keys, hosts, signals, hang-ups, deadlines, a full queue, memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import random_sequence
from running_service import RunningService, check_error, items, receive_all, serving, small_weights

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")]

ENCODE = "esm2-35m/encode"
GOOD = {"items": items("MKT")}
HEAVY = {"params": {"include": ["mean", "contacts"]}, "items": items(*[random_sequence(1024, i) for i in range(8)])}
HEAD = "POST /api/v3/esm2-35m/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = small_weights(tmp_path_factory.mktemp("weights"))
    return ["--model", f"esm2-35m={path}", "--backend", "numpy", "--threads", "1"]


@pytest.fixture(scope="module")
def keyless(weights: list[str]) -> Iterator[RunningService]:
    with serving(*weights, "--allow-host", "Proteins.Example") as running:
        yield running


def refused(*options: str, code: int = 2, environment: dict[str, str] | None = None, **popen: Any) -> str:
    """stderr of a service that does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "numpyesm", "serve", "--port", "0", *options],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | (environment or {}),
        **popen,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def heavy_in_background(service: RunningService, count: int = 1) -> list[threading.Thread]:
    """Requests that take seconds, under way; each thread has its answer in `answer` in the end."""

    def ask(thread: Any) -> None:
        try:
            thread.answer = service.post(ENCODE, HEAVY)
        except requests.RequestException as error:  # in the middle of its answer
            thread.answer = error

    threads = []
    for _ in range(count):
        thread: Any = threading.Thread(target=lambda: ask(threading.current_thread()), daemon=True)
        thread.start()
        threads.append(thread)
    service.wait_until(lambda: counter(service, "numpyesm_result_bytes") > 0)
    service.wait_until(lambda: counter(service, "numpyesm_queue_length") >= count - 1)
    return threads


def counter(service: RunningService, name: str) -> float:
    """Sum of a metric over its labels."""
    text = requests.get(f"{service.url}/metrics", timeout=60).text
    lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


# -- keys and hosts ----------------------------------------------------------------------------------------------------


def test_keys(weights: list[str], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst-key\n  second-key  \n")
    with serving(*weights, "--api-keys-file", str(file), environment={"NUMPYESM_API_KEYS": "third,fourth"}) as service:
        for key in ("first-key", "second-key", "third", "fourth"):
            for scheme in ("Token", "token", "TOKEN "):
                response = service.post(ENCODE, GOOD, headers={"Authorization": f"{scheme} {key}"})
                assert response.status_code == 200
        for value in (None, "Token", "Token ", "Token first", "Token first-key-and-more", "Bearer first-key",
                      "first-key", "Token first-key second-key", "Token \xfc", "Basic Zmlyc3Q6a2V5"):  # fmt: skip
            headers = {} if value is None else {"Authorization": value.encode("latin-1")}
            response = service.post(ENCODE, GOOD, headers=headers)
            assert check_error(response, 401)["code"] == "user.authentication"
            assert response.headers["www-authenticate"].startswith("Token")
            check_error(service.post("nothing/encode", GOOD, headers=headers), 401)  # says nothing of what there is
        for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json", "/metrics"):
            assert requests.get(service.url + path, timeout=60).status_code == 200
        # A service with keys may be reached under any name.
        named = {"Authorization": "Token first-key", "Host": "proteins.example"}
        assert service.post(ENCODE, GOOD, headers=named).status_code == 200
        service.stop()
        everything = "\n".join(service.log + service.talk)
        assert "first-key" not in everything
        assert "fourth" not in everything
        let_in = [entry for entry in service.entries() if entry["status"] == 200 and "slug" in entry]
        assert {entry["client"] for entry in let_in} == {"key-1", "key-2", "key-3", "key-4"}


def test_no_keys_means_loopback_only(weights: list[str], tmp_path: Path) -> None:
    message = refused("--host", "0.0.0.0", *weights)
    assert "--api-keys-file" in message
    assert "--allow-no-auth" in message
    (tmp_path / "empty").write_text("# none\n")
    assert "no key" in refused("--api-keys-file", str(tmp_path / "empty"), *weights)
    assert "cannot be read" in refused("--api-keys-file", str(tmp_path / "absent"), *weights)
    assert "no key" in refused(*weights, environment={"NUMPYESM_API_KEYS": " , "})
    with serving("--host", "0.0.0.0", "--allow-no-auth", *weights) as service:
        assert service.post(ENCODE, GOOD, headers={"Host": "anything.example"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "LOCALHOST:1234", "127.0.0.1", "127.9.9.9:80", "[::1]:8000")),
        ("proteins.example", 200),
        *((host, 403) for host in ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1")),
        *((host, 403) for host in ("", "@localhost")),
    ],
)
def test_dns_rebinding(keyless: RunningService, host: str, status: int) -> None:
    response = keyless.post(ENCODE, GOOD, headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        check_error(response, 403)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model", "ESM/2=synthetic"], "slug"),
        (["--model", "a=synthetic:esm2-8m", "--model", "a=synthetic:esm2-8m"], "twice"),
        (["--deadline", "0"], "--deadline"),
        (["--queue-size", "-1"], "--queue-size"),
        (["--max-memory", "lots"], "--max-memory='lots'"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--max-memory", "30M"], "a memory limit of 30 MiB"),
    ],
)
def test_wrong_use(weights: list[str], options: list[str], reason: str) -> None:
    assert reason in refused(*weights, *options)


def test_a_taken_port(weights: list[str], keyless: RunningService) -> None:
    assert re.search("in use|taken", refused(*weights, "--port", str(keyless.port)))


# -- load --------------------------------------------------------------------------------------------------------------


def test_small_requests_and_health_pass_large_ones_of_others(keyless: RunningService) -> None:
    """A short sequence does not wait for eight long ones: the engine takes them in turn."""
    (thread,) = heavy_in_background(keyless)
    for _ in range(5):
        assert requests.get(f"{keyless.url}/healthz", timeout=60).status_code == 200
    assert keyless.post(ENCODE, GOOD).status_code == 200
    assert thread.is_alive()
    thread.join(120)


def test_a_client_that_hangs_up_frees_its_place(keyless: RunningService) -> None:
    (thread,) = heavy_in_background(keyless)
    left = counter(keyless, "numpyesm_hang_ups_total")
    body = json.dumps(HEAVY)
    connections = [keyless.connect() for _ in range(5)]
    for connection in connections:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    keyless.wait_until(lambda: counter(keyless, "numpyesm_queue_length") >= 5)
    for connection in connections:
        connection.close()
    keyless.wait_until(lambda: counter(keyless, "numpyesm_hang_ups_total") == left + 5)
    assert counter(keyless, "numpyesm_queue_length") <= 1  # the first, perhaps, in its last pass
    assert [entry["status"] for entry in keyless.entries()].count(499) >= 5
    thread.join(120)
    keyless.wait_until(lambda: counter(keyless, "numpyesm_result_bytes") == 0)


def test_half_a_body_and_gone(keyless: RunningService) -> None:
    with keyless.connect() as connection:
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    assert keyless.post(ENCODE, GOOD).status_code == 200


def test_full_queue_and_deadline(weights: list[str]) -> None:
    with serving(*weights, "--queue-size", "4", "--deadline", "1.5") as service:
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda _: service.post(ENCODE, HEAVY), range(24)))
        statuses = {answer.status_code for answer in answers}
        assert statuses <= {200, 429, 503}
        assert 429 in statuses  # all are one client: its share is full before the queue is
        late = [answer for answer in answers if answer.status_code == 503]
        for answer in answers:
            if answer.status_code != 200:
                check_error(answer, answer.status_code)
                assert int(answer.headers["retry-after"]) >= 1
        assert {answer.json()["code"] for answer in late} == {"server.deadline"}
        service.wait_until(lambda: counter(service, "numpyesm_result_bytes") == 0)
        assert service.post(ENCODE, GOOD).status_code == 200


def test_queue_is_shared_between_clients(weights: list[str]) -> None:
    """One client fills its share and gets 429; another still gets in, until the queue itself is full: 503."""
    with serving(*weights, "--queue-size", "4", environment={"NUMPYESM_API_KEYS": "aaa bbb ccc"}) as service:

        def ask(key: str, body: dict[str, Any]) -> int:
            return service.post(ENCODE, body, headers={"Authorization": f"Token {key}"}).status_code

        with ThreadPoolExecutor(16) as pool:
            for waiting, key in enumerate(["aaa", "aaa", "aaa", "bbb"], start=1):
                pool.submit(ask, key, HEAVY)
                service.wait_until(lambda waiting=waiting: counter(service, "numpyesm_queue_length") == waiting)
            assert (ask("aaa", GOOD), ask("ccc", GOOD)) == (429, 503)
            service.process.kill()


# -- memory and threads ------------------------------------------------------------------------------------------------

LARGEST = {
    "params": {
        "include": ["mean", "per_token", "bos", "contacts", "logits", "attentions"],
        "repr_layers": [0, 1, 2, 3],
    },
    "items": items(*["A" * 2048] * 8),
}


@pytest.mark.parametrize("limit", ["--max-memory", "ulimit -v"])
def test_requests_that_would_take_too_much_memory_are_refused(weights: list[str], limit: str) -> None:
    """By the service's own limit, and by the system's on the address space, which kills."""
    size = 200 << 20 if limit == "--max-memory" else 512 << 20
    options = ["--max-memory", str(size)] if limit == "--max-memory" else []
    address_space = None if options else size
    with serving(*weights, *options, address_space=address_space) as service:
        document = check_error(service.post(ENCODE, LARGEST), 413)
        assert document["code"] == "user.memory"
        assert "GiB" in document["detail"]
        for length in (512, 100):
            assert service.post(ENCODE, {**LARGEST, "items": items("A" * length)}).status_code == 200
        assert service.status("VmHWM") < size >> 10


def test_a_process_that_may_start_no_threads_says_so_in_a_line(weights: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import threading\n"
        'def start(self): raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread.start = start\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    message = refused(*weights, code=1, environment={"PYTHONPATH": paths})
    assert "numpyesm: error: the service cannot start its threads" in message.splitlines()[-1]


# -- leaving -----------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_what_runs_and_takes_nothing_new(weights: list[str]) -> None:
    with serving(*weights) as service:
        threads: list[Any] = heavy_in_background(service, 2)
        service.process.send_signal(signal.SIGTERM)
        service.wait_until(lambda: requests.get(f"{service.url}/readyz", timeout=60).status_code == 503)
        check_error(service.post(ENCODE, GOOD), 503)
        assert requests.get(f"{service.url}/healthz", timeout=60).status_code == 200
        for thread in threads:
            thread.join(120)
            assert len(thread.answer.json()["results"]) == 8
        assert service.process.wait(30) == 0


def test_sigterm_with_nothing_to_do(weights: list[str]) -> None:
    with serving(*weights) as service, service.connect() as idle:  # an open connection does not hold it up
        assert service.stop() == 0
        assert receive_all(idle) == b""


@pytest.mark.parametrize("how", ["the grace ends", "a second signal"])
def test_who_waits_is_told_when_time_is_up(weights: list[str], how: str) -> None:
    with serving(*weights, "--grace", "0.5" if how == "the grace ends" else "300") as service:
        threads: list[Any] = heavy_in_background(service, 6)
        service.process.send_signal(signal.SIGTERM)
        if how == "a second signal":
            service.wait_until(lambda: requests.get(f"{service.url}/readyz", timeout=60).status_code == 503)
            service.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        answers = [thread.answer for thread in threads]
        told = [answer for answer in answers if isinstance(answer, requests.Response) and answer.status_code == 503]
        assert len(told) >= 4
        for answer in told:
            assert check_error(answer, 503)["code"] == "server.draining"
        assert service.stop() == 0
        assert "Traceback" not in "\n".join(service.talk)
