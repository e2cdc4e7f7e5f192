"""The service as a process: keys, hosts, signals, hang-ups, deadlines, a full queue, memory."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import random_sequence
from running_service import RunningService, check_error, items, serving

from numpyesm import InvalidOption
from numpyesm.api.keys import read_keys

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")]

ENCODE = "esm2-35m/encode"
GOOD = {"items": items("MKT")}
HEAVY = {"params": {"include": ["mean", "contacts"]}, "items": items(*[random_sequence(768, i) for i in range(8)])}
HEAD = "POST /api/v3/esm2-35m/encode HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def weights(small_file: str) -> list[str]:
    return ["--model", f"esm2-35m={small_file}", "--backend", "numpy", "--threads", "1"]


@pytest.fixture(scope="module")
def keyless(weights: list[str]) -> Iterator[RunningService]:
    with serving(*weights, "--allow-host", "Proteins.Example") as running:
        yield running


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """For requests that others must wait for."""
    pool = ThreadPoolExecutor(24)
    yield pool
    pool.shutdown(wait=False)


def heavy(service: RunningService, pool: ThreadPoolExecutor, count: int = 1) -> list[Future[requests.Response]]:
    """Requests that take seconds; one of them has begun, the others wait."""
    answers = [pool.submit(service.post, ENCODE, HEAVY) for _ in range(count)]
    service.wait_until(lambda: counter(service, "numpyesm_result_bytes") > 0)
    service.wait_until(lambda: counter(service, "numpyesm_queue_length") >= count - 1)
    return answers


def counter(service: RunningService, name: str) -> float:
    """Sum of a metric over its labels."""
    text = requests.get(f"{service.url}/metrics", timeout=60).text
    lines = [line for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


# -- how it is started -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "--api-keys-file, or say --allow-no-auth"),
        (["--api-keys-file", "empty"], "no key"),
        (["--api-keys-file", "absent"], "cannot be read"),
        (["--model", "ESM/2=synthetic"], "slug"),
        (["--model", "a=synthetic:esm2-8m", "--model", "a=synthetic:esm2-8m"], "twice"),
        (["--deadline", "0"], "--deadline"),
        (["--queue-size", "-1"], "--queue-size"),
        (["--max-memory", "lots"], "--max-memory='lots'"),
        (["--max-memory", "30M"], "a memory limit of 30 MiB"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--port", "TAKEN"], "in use|taken"),
    ],
)
def test_wrong_use(run: Any, weights: list[str], keyless: RunningService, options: list[str], reason: str) -> None:
    Path("empty").write_text("# none\n")
    options = [str(keyless.port) if option == "TAKEN" else option for option in options]
    done = run("serve", "--port", "0", *weights, *options, bare=True)
    assert done.code == 2
    assert re.search(reason, done.err)


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbf# ours\n\nfirst-key\n  second-key  \n")  # with a byte order mark
    monkeypatch.setenv("NUMPYESM_API_KEYS", "third,fourth fifth")
    assert read_keys(file) == ["first-key", "second-key", "third", "fourth", "fifth"]
    file.write_text("two keys\n")
    with pytest.raises(InvalidOption, match="blank"):
        read_keys(file)
    monkeypatch.setenv("NUMPYESM_API_KEYS", " , ")
    with pytest.raises(InvalidOption, match="no key"):
        read_keys(None)


def test_keys_are_named_by_number_in_the_log(weights: list[str], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first-key\n")
    options = ["--api-keys-file", str(tmp_path / "keys")]
    with serving(*weights, *options, environment={"NUMPYESM_API_KEYS": "other-key"}) as service:
        for key in ("first-key", "other-key"):
            # A service with keys may be reached under any name.
            headers = {"Authorization": f"Token {key}", "Host": "proteins.example"}
            assert service.post(ENCODE, GOOD, headers=headers).status_code == 200
        check_error(service.post(ENCODE, GOOD), 401)
        for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json", "/metrics"):
            assert requests.get(service.url + path, timeout=60).status_code == 200
        service.stop()
        assert [entry["client"] for entry in service.entries() if "slug" in entry] == ["key-1", "key-2"]
        everything = "\n".join(service.log + service.talk)
        assert "first-key" not in everything
        assert "other-key" not in everything


def test_without_keys_everybody_is_let_in_only_if_that_is_said(weights: list[str]) -> None:
    with serving("--host", "0.0.0.0", "--allow-no-auth", *weights) as service:
        assert service.post(ENCODE, GOOD, headers={"Host": "anything.example"}).status_code == 200


@pytest.mark.parametrize(
    ("status", "hosts"),
    [
        (200, ["localhost", "LOCALHOST:1234", "127.0.0.1", "127.9.9.9:80", "[::1]:8000", "proteins.example"]),
        (403, ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "10.0.0.1", "", "@localhost"]),
    ],
)
def test_dns_rebinding(keyless: RunningService, status: int, hosts: list[str]) -> None:
    for host in hosts:
        response = keyless.post(ENCODE, GOOD, headers={"Host": host})
        assert response.status_code == status, host
        if status == 403:
            check_error(response, 403)


def test_a_process_that_may_start_no_threads_says_so_in_a_line(weights: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import threading\n"
        'def start(self): raise RuntimeError("can\'t start new thread")\n'
        "threading.Thread.start = start\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "numpyesm", "serve", "--port", "0", *weights]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": paths})
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "numpyesm: error: the service cannot start its threads" in done.stderr.splitlines()[-1]


# -- load --------------------------------------------------------------------------------------------------------------


def test_small_requests_pass_large_ones_and_who_hangs_up_frees_its_place(
    keyless: RunningService, pool: ThreadPoolExecutor
) -> None:
    """A short sequence does not wait for eight long ones: the engine takes them in turn."""
    (answer,) = heavy(keyless, pool)
    assert requests.get(f"{keyless.url}/healthz", timeout=60).status_code == 200
    assert keyless.post(ENCODE, GOOD).status_code == 200
    assert not answer.done()
    left = counter(keyless, "numpyesm_hang_ups_total")
    body = json.dumps(HEAVY)
    connections = [keyless.connect() for _ in range(5)]
    for connection in connections:
        connection.sendall(f"{HEAD}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    keyless.wait_until(lambda: counter(keyless, "numpyesm_queue_length") >= 5)
    for connection in connections:
        connection.close()
    with keyless.connect() as connection:  # half a body, and gone
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n{{".encode())
    keyless.wait_until(lambda: counter(keyless, "numpyesm_hang_ups_total") == left + 6)
    assert counter(keyless, "numpyesm_queue_length") <= 1  # the first, perhaps, in its last pass
    assert [entry["status"] for entry in keyless.entries()].count(499) >= 6
    assert answer.result(120).status_code == 200
    keyless.wait_until(lambda: counter(keyless, "numpyesm_result_bytes") == 0)


def test_deadline(weights: list[str], pool: ThreadPoolExecutor) -> None:
    with serving(*weights, "--queue-size", "4", "--deadline", "1") as service:
        answers = list(pool.map(lambda _: service.post(ENCODE, HEAVY), range(12)))
        # All are one client: its share is full before the queue is.
        assert {answer.status_code for answer in answers} - {200} == {429, 503}
        for answer in answers:
            if answer.status_code != 200:
                code = check_error(answer, answer.status_code)["code"]
                assert code == ("server.deadline" if answer.status_code == 503 else "user.rate")
                assert int(answer.headers["retry-after"]) >= 1
        service.wait_until(lambda: counter(service, "numpyesm_result_bytes") == 0)
        assert service.post(ENCODE, GOOD).status_code == 200


def test_queue_is_shared_between_clients(weights: list[str], pool: ThreadPoolExecutor) -> None:
    """One client fills its share and gets 429; another still gets in, until the queue itself is full: 503."""
    with serving(*weights, "--queue-size", "4", environment={"NUMPYESM_API_KEYS": "aaa bbb ccc"}) as service:

        def ask(key: str, body: dict[str, Any]) -> int:
            return service.post(ENCODE, body, headers={"Authorization": f"Token {key}"}).status_code

        for waiting, key in enumerate(["aaa", "aaa", "aaa", "bbb"], start=1):
            pool.submit(ask, key, HEAVY)
            service.wait_until(lambda waiting=waiting: counter(service, "numpyesm_queue_length") == waiting)
        assert (ask("aaa", GOOD), ask("ccc", GOOD)) == (429, 503)


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
    with serving(*weights, *options, address_space=None if options else size) as service:
        document = check_error(service.post(ENCODE, LARGEST), 413)
        assert document["code"] == "user.memory"
        assert "GiB" in document["detail"]
        for length in (512, 100):
            assert service.post(ENCODE, {**LARGEST, "items": items("A" * length)}).status_code == 200
        assert service.status("VmHWM") < size >> 10


# -- leaving -----------------------------------------------------------------------------------------------------------


def test_sigterm_finishes_what_runs_and_takes_nothing_new(weights: list[str], pool: ThreadPoolExecutor) -> None:
    with serving(*weights, "--grace", "300") as service, service.connect():  # an idle connection does not hold it up
        (answer,) = heavy(service, pool)
        service.process.send_signal(signal.SIGTERM)
        service.wait_until(lambda: requests.get(f"{service.url}/readyz", timeout=60).status_code == 503)
        check_error(service.post(ENCODE, GOOD), 503)
        assert requests.get(f"{service.url}/healthz", timeout=60).status_code == 200
        assert len(answer.result(120).json()["results"]) == 8
        assert service.process.wait(30) == 0


@pytest.mark.parametrize("how", ["the grace ends", "a second signal"])
def test_who_waits_is_told_when_time_is_up(weights: list[str], pool: ThreadPoolExecutor, how: str) -> None:
    with serving(*weights, "--grace", "0.5" if how == "the grace ends" else "300") as service:
        answers = heavy(service, pool, 6)
        service.process.send_signal(signal.SIGTERM)
        if how == "a second signal":
            service.wait_until(lambda: requests.get(f"{service.url}/readyz", timeout=60).status_code == 503)
            service.process.send_signal(signal.SIGTERM)
        # One may be in the midst of its answer.
        told = [one.result(60) for one in answers if one.exception(60) is None]
        told = [answer for answer in told if answer.status_code == 503]
        assert len(told) >= 4
        for answer in told:
            assert check_error(answer, 503)["code"] == "server.draining"
        assert service.stop() == 0
        assert "Traceback" not in "\n".join(service.talk)
