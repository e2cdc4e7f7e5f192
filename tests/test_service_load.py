"""Two hundred clients at once, and the largest request: right answers, nothing leaks, no more memory than said."""

from __future__ import annotations

import asyncio
import io
import os
import random
from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest
import requests
from conftest import random_sequence
from running_service import items, load_quietly, same, serving

from numpyesm import ESM2

pytestmark = pytest.mark.slow
CLIENTS = 200
REQUESTS = int(os.environ.get("NUMPYESM_LOAD_REQUESTS", "4"))  # of each client
EVERYTHING = {"repr_layers": [0, 1, 2, 3], "include": ["mean", "per_token", "bos", "contacts", "logits", "attentions"]}


def cases(library: ESM2) -> list[tuple[str, dict[str, Any], Any]]:
    """Requests of all kinds, each with what the library says to it alone."""
    chosen = random.Random(1)
    made: list[tuple[str, dict[str, Any], Any]] = []
    for number in range(60):
        sequences = [random_sequence(chosen.randint(1, 60), 100 * number + i) for i in range(chosen.randint(1, 4))]
        action = chosen.choice(["encode", "encode", "encode", "predict", "log_prob"])
        params: dict[str, Any] = {}
        if action == "encode":
            params = {"repr_layers": chosen.sample(range(-4, 4), 2), "include": chosen.sample(EVERYTHING["include"], 2)}
            expected = [result.to_dict() for result in library.encode(sequences, **params)]
        elif action == "predict":
            sequences = [sequence + "<mask>" for sequence in sequences]
            params = {"positions": chosen.choice(["all", "masked"])}
            expected = [result.to_dict() for result in library.predict(sequences, **params)]
        else:
            expected = [{"log_prob": score} for score in library.log_prob(sequences).tolist()]
        made.append((action, {"params": params, "items": items(*sequences)}, {"results": expected}))
    return made


def test_two_hundred_clients(small_file: str) -> None:
    asked = cases(load_quietly(small_file, backend="numpy", threads=1))
    statuses: Counter[int] = Counter()
    memory: list[int] = []
    with serving("--model", f"esm2-35m={small_file}", "--backend", "numpy", "--threads", "2") as service:
        before = (service.open_files(), service.status("Threads"))

        async def client(number: int, http: httpx.AsyncClient) -> None:
            chosen = random.Random(number)
            for _ in range(REQUESTS):
                action, body, expected = chosen.choice(asked)
                response = await http.post(f"/api/v3/esm2-35m/{action}/", json=body)
                statuses[response.status_code] += 1
                if response.status_code == 200:
                    same(response.json(), expected)
                else:
                    assert int(response.headers["retry-after"]) >= 1
                memory.append(service.status("VmRSS"))

        async def everybody() -> None:
            limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
            async with httpx.AsyncClient(base_url=service.url, limits=limits, timeout=300) as http:
                await asyncio.gather(*(client(number, http) for number in range(CLIENTS)))

        asyncio.run(everybody())
        assert set(statuses) <= {200, 429, 503}
        assert statuses[200] > CLIENTS
        # Level after the start: what is held at the end is what was held before.
        third = len(memory) // 3
        assert max(memory[-third:]) < 1.15 * max(memory[: 2 * third]) + 20_000  # kB
        service.wait_until(lambda: service.open_files() <= before[0] + 3)
        assert service.status("Threads") <= before[1] + 8  # the pools fill once
        text = requests.get(f"{service.url}/metrics", timeout=60).text
        assert "numpyesm_queue_length 0.0" in text
        assert "numpyesm_result_bytes 0.0" in text
        passes = next(float(line.split()[-1]) for line in text.splitlines() if line.startswith("numpyesm_passes_total"))
        assert passes < statuses[200]  # small requests share passes


def test_largest_request(small_file: str) -> None:
    """Eight items of 2048, every layer, every output: answered, within the memory that was promised."""
    sequences = [random_sequence(2048, i) for i in range(8)]
    body = {"params": EVERYTHING, "items": items(*sequences)}
    with serving("--model", f"esm2-35m={small_file}", "--max-memory", "600M") as service:
        idle = service.status("VmRSS")
        url = f"{service.url}/api/v3/esm2-35m/encode"
        size = 0
        with requests.post(url, json=body, stream=True, timeout=400) as response:
            assert response.status_code == 200
            for piece in response.iter_content(1 << 20):
                size += len(piece)
        assert size > 10**8
        # A second time: freed memory serves again, nothing piles up.
        npz = requests.post(url, json=body, headers={"Accept": "application/x-npz"}, timeout=400)
        assert service.status("VmHWM") < 600 * 1024
        assert service.status("VmHWM") > idle + 100 * 1024  # the maps of eight items at least were there
    expected = load_quietly(small_file).encode([sequences[7]], **EVERYTHING)[0]
    with np.load(io.BytesIO(npz.content)) as arrays:
        np.testing.assert_allclose(arrays["contacts_7"], expected.contacts, atol=1e-5)
        np.testing.assert_allclose(arrays["attentions_7"], expected.attentions, atol=1e-5)
        assert arrays["per_token_0_3"].shape == (2048, 80)
