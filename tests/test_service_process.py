"""The service as a process: keys, hosts, signals, hang-ups, deadlines, a full queue, memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import random_sequence
from running_service import RunningService, receive_all, serving, small_weights
from test_service_contract import check_error, items

GOOD = {"items": [{"sequence": "MKT"}]}
HEAVY = {"params": {"include": ["mean", "contacts"]}, "items": items(*[random_sequence(1024, i) for i in range(8)])}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = small_weights(tmp_path_factory.mktemp("weights"))
    return ["--model", f"esm2-35m={path}", "--backend", "numpy", "--threads", "1"]


@pytest.fixture(scope="module")
def keyless(weights: list[str]) -> Iterator[RunningService]:
    with serving(*weights, "--allow-host", "Proteins.Example") as running:
        yield running


def refused(*options: str, environment: dict[str, str] | None = None) -> str:
    """stderr of a service that does not start for wrong use."""
    done = subprocess.run(
        [sys.executable, "-m", "numpyesm", "serve", "--port", "0", *options],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | (environment or {}),
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def heavy_in_background(service: RunningService) -> threading.Thread:
    """A request that takes seconds, under way."""
    thread = threading.Thread(target=lambda: service.post("esm2-35m/encode", HEAVY), daemon=True)
    thread.start()
    service.wait_until(lambda: counter(service, "numpyesm_result_bytes") > 0)
    return thread


def counter(service: RunningService, name: str) -> float:
    """Sum of a metric over its labels."""
    text = requests.get(f"{service.url}/metrics", timeout=60).text
    lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


# -- keys and hosts --------------------------------------------------------------------------------------------------


def test_keys(weights: list[str], tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nfirst-key\n  second-key  \n")
    with serving(*weights, "--api-keys-file", str(file), environment={"NUMPYESM_API_KEYS": "third,fourth"}) as service:
        for key in ("first-key", "second-key", "third", "fourth"):
            for scheme in ("Token", "token", "TOKEN "):
                response = service.post("esm2-35m/encode", GOOD, headers={"Authorization": f"{scheme} {key}"})
                assert response.status_code == 200
        for value in (None, "Token", "Token ", "Token first", "Token first-key-and-more", "Bearer first-key",
                      "first-key", "Token first-key second-key", "Token \xfc", "Basic Zmlyc3Q6a2V5"):  # fmt: skip
            headers = {} if value is None else {"Authorization": value.encode("latin-1")}
            response = service.post("esm2-35m/encode", GOOD, headers=headers)
            document = check_error(response, 401)
            assert document["code"] == "user.authentication"
            assert response.headers["www-authenticate"].startswith("Token")
            check_error(service.post("nothing/encode", GOOD, headers=headers), 401)  # says nothing of what there is
        for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json", "/metrics"):
            assert requests.get(service.url + path, timeout=60).status_code == 200
        # A service with keys may be reached under any name.
        named = {"Authorization": "Token first-key", "Host": "proteins.example"}
        assert service.post("esm2-35m/encode", GOOD, headers=named).status_code == 200
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
        assert service.post("esm2-35m/encode", GOOD, headers={"Host": "anything.example"}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1234", 200),
        ("127.0.0.1", 200),
        ("127.9.9.9:80", 200),
        ("[::1]:8000", 200),
        ("proteins.example", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example", 403),
        ("10.0.0.1", 403),
        ("", 403),
        ("@localhost", 403),
    ],
)
def test_dns_rebinding(keyless: RunningService, host: str, status: int) -> None:
    response = keyless.post("esm2-35m/encode", GOOD, headers={"Host": host})
    assert response.status_code == status
    if status == 403:
        check_error(response, 403)


def test_wrong_use(weights: list[str], keyless: RunningService) -> None:
    assert "taken" in refused("--port", str(keyless.port), *weights) or "in use" in refused(
        "--port", str(keyless.port), *weights
    )
    assert "slug" in refused("--model", "ESM/2=synthetic")
    assert "twice" in refused("--model", "a=synthetic:esm2-8m", "--model", "a=synthetic:esm2-8m")
    assert "--deadline" in refused("--deadline", "0", *weights)
    assert "--queue-size" in refused("--queue-size", "-1", *weights)
    assert "size" in refused("--max-memory", "lots", *weights)
    assert "--host" in refused("--host", "no.such.host.invalid", *weights)


# -- load ------------------------------------------------------------------------------------------------------------


def test_health_while_the_engine_works(keyless: RunningService) -> None:
    thread = heavy_in_background(keyless)
    times = []
    while thread.is_alive():
        start = time.perf_counter()
        assert requests.get(f"{keyless.url}/healthz", timeout=60).status_code == 200
        times.append(time.perf_counter() - start)
    assert len(times) > 5


def test_small_requests_pass_large_ones_of_others(keyless: RunningService) -> None:
    """A single short sequence does not wait for eight long ones: the engine takes them in turn."""
    thread = heavy_in_background(keyless)
    assert keyless.post("esm2-35m/encode", GOOD).status_code == 200
    assert thread.is_alive()
    thread.join(120)


def test_a_client_that_hangs_up_frees_its_place(keyless: RunningService) -> None:
    thread = heavy_in_background(keyless)
    left = counter(keyless, "numpyesm_hang_ups_total")
    body = json.dumps(HEAVY)
    head = "POST /api/v3/esm2-35m/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connections = [keyless.connect() for _ in range(5)]
    for connection in connections:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
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
        head = "POST /api/v3/esm2-35m/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
    assert keyless.post("esm2-35m/encode", GOOD).status_code == 200


def test_full_queue_and_deadline(weights: list[str]) -> None:
    with serving(*weights, "--queue-size", "4", "--deadline", "1.5") as service:
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda _: service.post("esm2-35m/encode", HEAVY), range(24)))
        statuses = {answer.status_code for answer in answers}
        assert statuses <= {200, 429, 503}
        assert 429 in statuses  # all are one client: its share is full before the queue is
        late = [answer for answer in answers if answer.status_code == 503]
        assert late
        for answer in answers:
            if answer.status_code != 200:
                check_error(answer, answer.status_code)
                assert int(answer.headers["retry-after"]) >= 1
        assert {answer.json()["code"] for answer in late} == {"server.deadline"}
        service.wait_until(lambda: counter(service, "numpyesm_result_bytes") == 0)
        assert service.post("esm2-35m/encode", GOOD).status_code == 200


def test_queue_is_shared_between_clients(weights: list[str], tmp_path: Path) -> None:
    """One client fills its share and gets 429; another still gets in, until the queue itself is full: 503."""
    environment = {"NUMPYESM_API_KEYS": "aaa bbb ccc"}
    with serving(*weights, "--queue-size", "4", "--deadline", "60", environment=environment) as service:
        codes: dict[str, list[Any]] = {"aaa": [], "bbb": [], "ccc": []}

        def ask(key: str, body: dict[str, Any]) -> None:
            answer = service.post("esm2-35m/encode", body, headers={"Authorization": f"Token {key}"})
            codes[key].append(answer.status_code)

        with ThreadPoolExecutor(16) as pool:
            for _ in range(4):
                pool.submit(ask, "aaa", HEAVY)
                time.sleep(0.1)
            pool.submit(ask, "bbb", HEAVY)
            service.wait_until(lambda: counter(service, "numpyesm_queue_length") == 4)
            ask("aaa", GOOD)
            ask("ccc", GOOD)
            assert codes["aaa"].count(429) >= 1
            assert codes["ccc"] == [503]
            service.process.kill()


def test_requests_that_would_take_too_much_memory_are_refused(weights: list[str]) -> None:
    with serving(*weights, "--max-memory", "200M") as service:
        body = {
            "params": {"include": ["per_token", "contacts"], "repr_layers": [0, 1, 2, 3]},
            "items": items(*["A" * 2048] * 8),
        }
        document = check_error(service.post("esm2-35m/encode", body), 413)
        assert document["code"] == "user.memory"
        assert "GiB" in document["detail"]
        body["items"] = items("A" * 512)
        assert service.post("esm2-35m/encode", body).status_code == 200
        assert service.status("VmHWM") < 200 * 1024


def test_a_limit_that_leaves_no_room_is_told_at_the_start(weights: list[str]) -> None:
    message = refused(*weights, "--max-memory", "30M")
    assert "--max-memory 30M" in message
    enough = int(re.findall(r"(\d+)M with one", message)[0]) + 20
    with serving(*weights, "--max-memory", f"{enough}M") as service:
        assert service.post("esm2-35m/encode", GOOD).status_code == 200


# -- leaving ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_sigterm_finishes_what_runs_and_takes_nothing_new(weights: list[str]) -> None:
    with serving(*weights) as service:
        answers: list[requests.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(service.post("esm2-35m/encode", HEAVY))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        service.wait_until(lambda: counter(service, "numpyesm_queue_length") >= 1)
        service.process.send_signal(signal.SIGTERM)
        service.wait_until(lambda: requests.get(f"{service.url}/readyz", timeout=60).status_code == 503)
        check_error(service.post("esm2-35m/encode", GOOD), 503)
        assert requests.get(f"{service.url}/healthz", timeout=60).status_code == 200
        for thread in threads:
            thread.join(120)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert all(len(answer.json()["results"]) == 8 for answer in answers)
        assert service.process.wait(30) == 0


def test_sigterm_with_nothing_to_do(weights: list[str]) -> None:
    with serving(*weights) as service, service.connect() as idle:  # an open connection does not hold it up
        start = time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - start < 20
        assert receive_all(idle) == b""


def test_grace_ends(weights: list[str]) -> None:
    with serving(*weights, "--grace", "0.5") as service:
        answers: list[int] = []

        def ask() -> None:
            try:
                answers.append(service.post("esm2-35m/encode", HEAVY).status_code)
            except requests.RequestException:  # in the middle of its answer
                answers.append(0)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        service.wait_until(lambda: counter(service, "numpyesm_queue_length") >= 5)
        assert service.stop() == 0
        for thread in threads:
            thread.join(60)
        assert len(answers) == 6
        assert set(answers) <= {0, 200, 503}
        assert answers.count(503) >= 3  # those that waited are told
