"""The function under Amazon's own runtime client, against a runtime API on loopback."""

from __future__ import annotations

import base64
import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import random_sequence
from lambda_runtime import ROOT, RuntimeApi, start_client, url_event

from numpyesm import ESM2, SyntheticWeightsWarning

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Lambda is Linux")]


@pytest.fixture(scope="session")
def runtime_client(tmp_path_factory) -> str:
    """The folder that holds `awslambdaric`: installed beside the tests, else fetched into a folder of its own."""
    found = importlib.util.find_spec("awslambdaric")
    if found is not None and found.origin:
        return str(Path(found.origin).parents[1])
    folder = tmp_path_factory.mktemp("awslambdaric")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "awslambdaric>=3"]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"awslambdaric can neither be imported nor installed: {done.stderr[-300:]}")
    return str(folder)


@pytest.fixture(scope="module")
def function(runtime_client):
    with RuntimeApi() as api:
        process = start_client(api, f"{ROOT}:{runtime_client}", NUMPYESM_MODEL="esm2-8m=synthetic:esm2-8m")
        try:
            assert api.asked.wait(60), process.communicate(timeout=5)[0]
            yield api
        finally:
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def model() -> ESM2:
    with pytest.warns(SyntheticWeightsWarning):
        return ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy", threads=2)


def ask(function: RuntimeApi, action: str, document: object, seconds: float = 60.0, **headers: str) -> dict[str, Any]:
    """Ask through a function URL."""
    event = url_event(f"/api/v3/esm2-8m/{action}/", document, **{"content-type": "application/json", **headers})
    return function.invoke(event, seconds)


def error(answer: dict[str, Any], status: int) -> dict[str, Any]:
    assert answer["statusCode"] == status
    return json.loads(answer["body"])


def test_cold_and_warm_and_whatever_comes_between(function, model) -> None:
    sequences = [random_sequence(n) for n in (12, 100)]
    expected = [r.embeddings[6] for r in model.encode(sequences)]
    for odd in ("text", {"items": [{"sequence": "MKT"}, {"sequence": "MK1"}]}, "{"):
        answer = ask(function, "encode", {"items": [{"sequence": s} for s in sequences]})
        assert answer["statusCode"] == 200
        results = json.loads(answer["body"])["results"]
        assert [r["sequence_index"] for r in results] == [0, 1]
        for result, mean in zip(results, expected, strict=True):
            np.testing.assert_allclose(result["embeddings"][0]["embedding"], mean, atol=1e-5)
        fields = list(error(ask(function, "encode", odd), 422)["error"])
        assert fields == (["__all__"] if isinstance(odd, str) else ["items__1__sequence"])
    for odd in (None, [], "text", {}, {"Records": []}, 7):
        error(function.invoke(odd), 400)


def test_too_large_an_answer_is_refused_and_as_gzip_it_goes_through(function, model) -> None:
    document = {"params": {"include": ["per_token"]}, "items": [{"sequence": random_sequence(2000)}]}
    refusal = error(ask(function, "encode", document), 413)
    assert refusal["code"] == "user.answer_too_large"
    assert "gzip" in refusal["detail"]
    answer = ask(function, "encode", document, **{"accept-encoding": "gzip"})
    assert answer["statusCode"] == 200, answer["body"][:500]
    result = json.loads(gzip.decompress(base64.b64decode(answer["body"])))["results"][0]
    found = np.float32(result["per_token_embeddings"][0]["embeddings"])
    expected = model.encode([random_sequence(2000)], include=["per_token"])[0].per_token_embeddings[6]
    np.testing.assert_allclose(found, expected, atol=2e-5)
    document["items"] *= 8  # beyond every form: refused before it is computed
    assert "numbers" in error(ask(function, "encode", document, accept="application/x-npz"), 413)["detail"]


def test_a_time_out_that_is_near_is_answered(function) -> None:
    """Eight proteins take seconds; with less than that left the answer says so, and comes in time."""
    document = {"params": {"include": ["contacts", "attentions"]}, "items": [{"sequence": random_sequence(250)}] * 8}
    refusal = error(ask(function, "encode", document, seconds=0.4, **{"accept-encoding": "gzip"}), 503)
    assert refusal["code"] == "server.deadline"
    assert "fewer or shorter" in refusal["detail"]
    assert ask(function, "log_prob", {"items": [{"sequence": "MKT"}]})["statusCode"] == 200


def test_a_function_without_weights_says_so_when_it_starts(runtime_client, tmp_path) -> None:
    with RuntimeApi() as api:
        process = start_client(
            api,
            f"{ROOT}:{runtime_client}",
            LAMBDA_TASK_ROOT=str(tmp_path),
            NUMPYESM_CACHE=str(tmp_path),
            NUMPYESM_WEIGHTS=str(tmp_path / "none"),
        )
        _, kind, content = api.answers.get(timeout=60)
        process.kill()
        process.communicate()
    assert kind == "error"
    assert "WeightsNotFound" in content.decode()
    assert "none" in content.decode()
