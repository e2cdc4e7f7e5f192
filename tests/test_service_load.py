"""Two hundred clients for a minute, and the largest request: right answers, nothing leaks, no more memory than said."""

from __future__ import annotations

import asyncio
import io
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import requests
from conftest import random_sequence
from running_service import RunningService, items, load_quietly, serving, small_weights

from numpyesm import ESM2

pytestmark = pytest.mark.slow
CLIENTS = 200
SECONDS = float(os.environ.get("NUMPYESM_LOAD_SECONDS", "60"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_weights(tmp_path_factory.mktemp("weights")))


@pytest.fixture(scope="module")
def service(weights: str) -> Iterator[RunningService]:
    with serving("--model", f"esm2-35m={weights}", "--backend", "numpy", "--threads", "2") as running:
        yield running


def cases(library: ESM2) -> list[tuple[str, dict[str, Any], Any]]:
    """Requests of all kinds, each with what the library says to it alone."""
    chosen = random.Random(1)
    made: list[tuple[str, dict[str, Any], Any]] = []
    for number in range(60):
        sequences = [random_sequence(chosen.randint(1, 60), 100 * number + i) for i in range(chosen.randint(1, 4))]
        action = chosen.choice(["encode", "encode", "encode", "predict", "log_prob"])
        if action == "encode":
            params: dict[str, Any] = {
                "repr_layers": chosen.sample(range(-4, 4), 2),
                "include": chosen.sample(["mean", "per_token", "bos", "contacts", "logits", "attentions"], 2),
            }
            expected = [result.to_dict() for result in library.encode(sequences, **params)]
        elif action == "predict":
            sequences = [sequence + "<mask>" for sequence in sequences]
            params = {"positions": chosen.choice(["all", "masked"])}
            expected = [result.to_dict() for result in library.predict(sequences, **params)]
        else:
            params = {}
            expected = [{"log_prob": score} for score in library.log_prob(sequences).tolist()]
        made.append((action, {"params": params, "items": items(*sequences)}, {"results": expected}))
    return made


def close(got: Any, expected: Any) -> bool:
    """Equal in shape, and in numbers to float32's last digits."""
    if isinstance(expected, dict):
        return got.keys() == expected.keys() and all(close(got[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        if expected and isinstance(expected[0], float | list):
            return bool(np.allclose(got, expected, rtol=1e-5, atol=1e-5))
        return len(got) == len(expected) and all(map(close, got, expected))
    if isinstance(expected, float):
        return abs(got - expected) <= 1e-5 * max(1.0, abs(expected))
    return bool(got == expected)


@pytest.mark.timeout(400)
def test_two_hundred_clients_for_a_minute(service: RunningService, weights: str) -> None:
    asked = cases(load_quietly(weights, backend="numpy", threads=1))
    statuses: Counter[int] = Counter()
    wrong: list[str] = []
    before = (service.open_files(), service.status("Threads"))
    memory: list[int] = []

    async def client(number: int, http: httpx.AsyncClient, end: float) -> None:
        chosen = random.Random(number)
        while time.monotonic() < end:
            action, body, expected = chosen.choice(asked)
            response = await http.post(f"/api/v3/esm2-35m/{action}/", json=body)
            statuses[response.status_code] += 1
            if response.status_code == 200:
                # All answers are looked at, every fourth number by number: comparing costs more than serving.
                answer = response.json()
                if len(answer["results"]) != len(expected["results"]) or (
                    chosen.random() < 0.25 and not close(answer, expected)
                ):
                    wrong.append(response.headers["x-request-id"])
            elif response.status_code in (429, 503):
                assert int(response.headers["retry-after"]) >= 1
                await asyncio.sleep(0.1)

    async def everybody() -> None:
        end = time.monotonic() + SECONDS
        limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=service.url, limits=limits, timeout=120) as http:
            clients = [asyncio.create_task(client(number, http, end)) for number in range(CLIENTS)]
            while not all(task.done() for task in clients):
                await asyncio.sleep(1)
                memory.append(service.status("VmRSS"))
            await asyncio.gather(*clients)

    asyncio.run(everybody())
    assert wrong == []
    assert set(statuses) <= {200, 429, 503}
    assert statuses[200] > CLIENTS
    # Level after the start: what is held at the end is what was held after a third of the time.
    third = len(memory) // 3
    assert max(memory[-third:]) < 1.15 * max(memory[: 2 * third]) + 20_000  # kB
    service.wait_until(lambda: service.open_files() <= before[0] + 3)
    assert service.status("Threads") <= before[1] + 8  # the pools fill once
    text = requests.get(f"{service.url}/metrics", timeout=60).text
    assert "numpyesm_queue_length 0.0" in text
    assert "numpyesm_result_bytes 0.0" in text
    passes = next(float(line.split()[-1]) for line in text.splitlines() if line.startswith("numpyesm_passes_total"))
    assert passes < statuses[200]  # small requests share passes


@pytest.mark.timeout(500)
def test_largest_request(weights: str) -> None:
    """Eight items of 2048, every layer, every output: answered, within the memory that was promised."""
    sequences = [random_sequence(2048, i) for i in range(8)]
    params = {
        "repr_layers": [0, 1, 2, 3],
        "include": ["mean", "per_token", "bos", "contacts", "logits", "attentions"],
    }
    body = {"params": params, "items": items(*sequences)}
    with serving("--model", f"esm2-35m={weights}", "--max-memory", "600M") as service:
        idle = service.status("VmRSS")
        url = f"{service.url}/api/v3/esm2-35m/encode"
        size = 0
        with requests.post(url, json=body, stream=True, timeout=400) as response:
            assert response.status_code == 200
            for piece in response.iter_content(1 << 20):
                size += len(piece)
        assert size > 10**8
        npz = requests.post(url, json=body, headers={"Accept": "application/x-npz"}, timeout=400)
        assert service.status("VmHWM") < 600 * 1024
        # A third time: freed memory serves again, nothing piles up.
        requests.post(url, json=body, headers={"Accept": "application/x-npz"}, timeout=400)
        assert service.status("VmHWM") < 600 * 1024
        assert service.status("VmHWM") > idle + 100 * 1024  # the maps of eight items at least were there
    library = load_quietly(weights)
    expected = library.encode([sequences[7]], **params)[0]
    with np.load(io.BytesIO(npz.content)) as arrays:
        np.testing.assert_allclose(arrays["contacts_7"], expected.contacts, atol=1e-5)
        np.testing.assert_allclose(arrays["attentions_7"], expected.attentions, atol=1e-5)
        assert arrays["per_token_0_3"].shape == (2048, 80)
