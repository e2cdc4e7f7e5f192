"""schemathesis over `/openapi.json`: every documented request is answered as documented, every other one refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from running_service import RunningService, serving, small_weights


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    weights = small_weights(tmp_path_factory.mktemp("weights"))
    with serving("--model", f"esm2-35m={weights}", "--backend", "numpy", "--threads", "1") as running:
        yield running


def test_schemathesis(service: RunningService, tmp_path: Path) -> None:
    """All its checks: status codes, answers' schemas, refusal of bad data, acceptance of good, wrong methods."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{service.url}/openapi.json", "--checks", "all"]
    command += ["--max-examples", "15", "--seed", "1", "--suppress-health-check", "all", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "8 selected / 8 total" in done.stdout


def test_the_document_covers_what_there_is(service: RunningService) -> None:
    paths = requests.get(f"{service.url}/openapi.json", timeout=60).json()["paths"]
    assert set(paths) == {
        *(f"/api/v3/{{slug}}/{action}/" for action in ("encode", "predict", "log_prob")),
        "/api/v3/schema/{slug}/{action}/",
        "/api/v3/models/",
        "/healthz",
        "/readyz",
        "/metrics",
    }
