"""The function under Amazon's own runtime client, against a runtime API on loopback."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import random_sequence
from lambda_runtime import Answer, RuntimeApi, running_function, url_event
from running_service import check_error, items, same

from numpyesm import ESM2

pytest.importorskip("awslambdaric")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="Lambda is Linux")]


@pytest.fixture(scope="module")
def function(small_file: str) -> Iterator[RuntimeApi]:
    with running_function(NUMPYESM_MODEL=f"small={small_file}") as api:
        yield api


def ask(function: RuntimeApi, action: str, document: object, seconds: float = 60.0, **headers: str) -> Answer:
    """Ask through a function URL."""
    event = url_event(f"/api/v3/small/{action}/", document, **{"content-type": "application/json", **headers})
    return function.invoke(event, seconds)


def test_cold_and_warm_and_whatever_comes_between(function: RuntimeApi, loaded: ESM2) -> None:
    sequences = [random_sequence(n) for n in (12, 100)]
    expected = [result.to_dict() for result in loaded.encode(sequences)]
    for odd, field in (("text", "__all__"), ({"items": items("MKT", "MK1")}, "items__1__sequence"), ("{", "__all__")):
        same(ask(function, "encode", {"items": items(*sequences)}).json(), {"results": expected})
        check_error(ask(function, "encode", odd), 422, field)
    for odd in (None, [], "text", {}, {"Records": []}, 7):
        check_error(function.invoke(odd), 400)


def test_too_large_an_answer_is_refused_and_as_gzip_it_goes_through(function: RuntimeApi, loaded: ESM2) -> None:
    sequences = [random_sequence(1000, i) for i in range(8)]
    document = {"params": {"include": ["per_token"]}, "items": items(*sequences)}
    refusal = check_error(ask(function, "encode", document), 413)
    assert refusal["code"] == "user.answer_too_large"
    assert "gzip" in refusal["detail"]
    answer = ask(function, "encode", document, **{"accept-encoding": "gzip"})
    assert answer.status_code == 200, answer.content[:500]
    result = json.loads(gzip.decompress(answer.content))["results"][7] | {"sequence_index": 0}
    same(result, loaded.encode(sequences[7:], include=["per_token"])[0].to_dict())


def test_a_time_out_that_is_near_is_answered(function: RuntimeApi) -> None:
    """Eight long proteins take seconds; with less than that left the answer says so, and comes in time."""
    document = {"params": {"include": ["attentions"]}, "items": items(*[random_sequence(2000)] * 8)}
    refusal = check_error(ask(function, "encode", document, seconds=0.4), 503)
    assert refusal["code"] == "server.deadline"
    assert "fewer or shorter" in refusal["detail"]
    assert ask(function, "log_prob", {"items": items("MKT")}).status_code == 200


def test_a_function_without_weights_says_so_when_it_starts(tmp_path: Path) -> None:
    nowhere = {"NUMPYESM_CACHE": str(tmp_path), "NUMPYESM_WEIGHTS": str(tmp_path / "none")}
    with running_function(LAMBDA_TASK_ROOT=str(tmp_path), **nowhere) as api:
        path, content = api.posted.get(timeout=60)
    assert path.endswith("/init/error")
    assert "WeightsNotFound" in content.decode()
    assert "none" in content.decode()
