"""The Lambda handler called directly: events of every kind, forms of bodies and answers, keys, errors."""

from __future__ import annotations

import base64
import gzip
import io
import json
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import random_sequence

from numpyesm import ESM2, SyntheticWeightsWarning
from numpyesm.serverless import deadline
from numpyesm.serverless.function import Function

ROOT = Path(__file__).parents[1]
ITEMS = {"items": [{"sequence": "MKTFF"}]}


@pytest.fixture(scope="module")
def model() -> ESM2:
    with pytest.warns(SyntheticWeightsWarning):
        return ESM2.from_pretrained("synthetic:esm2-8m", backend="numpy", threads=2)


@pytest.fixture
def function(model, monkeypatch) -> Function:
    monkeypatch.delenv("NUMPYESM_API_KEYS", raising=False)
    function = Function()
    function._loaded = "esm2-8m", model
    return function


def v2(path="/api/v3/esm2-8m/encode/", body=ITEMS, method="POST", stage="$default", **headers):
    text = body if isinstance(body, str | None) else json.dumps(body)
    return {
        "version": "2.0",
        "routeKey": "$default",
        "rawPath": path,
        "rawQueryString": "",
        "headers": {"content-type": "application/json", **headers},
        "requestContext": {"stage": stage, "http": {"method": method, "path": path, "protocol": "HTTP/1.1"}},
        "body": text,
        "isBase64Encoded": False,
    }


def v1(path="/api/v3/esm2-8m/encode/", body=ITEMS, method="POST", **headers):
    names = {"Content-Type": "application/json", **headers}
    return {
        "resource": "/{proxy+}",
        "path": path,
        "httpMethod": method,
        "headers": names,
        "multiValueHeaders": {name: [value] for name, value in names.items()},
        "requestContext": {"stage": "prod", "path": f"/prod{path}"},
        "body": json.dumps(body),
        "isBase64Encoded": False,
    }


def packed(event, data: bytes):
    return event | {"body": base64.b64encode(data).decode(), "isBase64Encoded": True}


def error_of(answer):
    document = json.loads(answer["body"])
    assert set(document) == {"detail", "errors", "status_code", "code", "error"}
    assert document["status_code"] == answer["statusCode"]
    return document


# -- events --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "event",
    [
        v2(),
        v2("/api/v3/esm2-8m/encode"),
        v2("/api/v1/esm2-8m/encode/"),
        v2("/prod/api/v3/esm2-8m/encode/", stage="prod"),
        v2("/base/api/v3/esm2-8m/encode"),
        v2("/prod/base/api/v3/esm2-8m/encode", stage="prod"),
        v2("/api/api/v3/esm2-8m/encode", stage="api"),
        v2("/api/v3/esm2-8m/encode", stage="api"),
        v1(),
        v1("/api/v1/esm2-8m/encode"),
        v1("/base/api/v3/esm2-8m/encode/"),
        v1("/api/v3/esm2%2D8m/encode/"),
        {k: v for k, v in v1().items() if k != "multiValueHeaders"},
        {k: v for k, v in v1().items() if k != "headers"},
        packed(v2(), json.dumps(ITEMS).encode()),
        packed(v2(**{"content-encoding": "gzip"}), gzip.compress(json.dumps(ITEMS).encode())),
        packed(v1(**{"Content-Encoding": "GZIP"}), gzip.compress(json.dumps(ITEMS).encode())),
        packed(
            v2(**{"content-encoding": "gzip"}), gzip.compress(b'{"items":[{"seq') + gzip.compress(b'uence":"MKTFF"}]}')
        ),
    ],
)
def test_every_kind_of_event_gets_the_same_answer(function, model, event) -> None:
    answer = function.handle(json.loads(json.dumps(event)))
    assert answer["statusCode"] == 200, answer["body"]
    assert answer["headers"]["content-type"] == "application/json"
    assert answer["isBase64Encoded"] is False
    json.dumps(answer)
    (result,) = json.loads(answer["body"])["results"]
    expected = model.encode(["MKTFF"])[0]
    assert result.keys() == expected.to_dict().keys()
    np.testing.assert_array_equal(np.float32(result["embeddings"][0]["embedding"]), expected.embeddings[6])


def test_all_outputs_are_the_librarys(function, model) -> None:
    include = ["mean", "per_residue", "bos", "contacts", "logits", "attentions"]
    sequences = [random_sequence(n) for n in (1, 2, 40)]
    params = {"repr_layers": [-1, 0, 3, 6], "include": include}
    answer = function.handle(v2(body={"params": params, "items": [{"sequence": s} for s in sequences]}))
    results = json.loads(answer["body"])["results"]
    expected = [r.to_dict() for r in model.encode(sequences, [-1, 0, 3, 6], include)]
    assert _rounded(results) == _rounded(expected)


def _rounded(value):
    """Numbers as float32: what an answer's digits must determine."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return value if isinstance(value, str) else float(np.float32(value))


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_predict_and_log_prob(function, model, positions) -> None:
    sequence = "MK<mask>TW<mask>F"
    body = {"params": {"positions": positions}, "items": [{"sequence": sequence}]}
    answer = function.handle(v2("/api/v3/esm2-8m/predict/", body))
    expected = [r.to_dict() for r in model.predict([sequence], positions)]
    assert _rounded(json.loads(answer["body"])["results"]) == _rounded(expected)
    answer = function.handle(v2("/api/v3/esm2-8m/log_prob/", {"items": [{"sequence": "MKTFF"}]}))
    assert json.loads(answer["body"]) == {"results": [{"log_prob": float(model.log_prob(["MKTFF"])[0])}]}


@pytest.mark.parametrize("event", [v2, v1])
def test_answers_are_gzipped_when_asked_for(function, event) -> None:
    plain = function.handle(event())
    for accept in ("gzip", "br, gzip;q=0.5", "*"):
        answer = function.handle(event(**{"Accept-Encoding": accept}))
        assert answer["isBase64Encoded"] is True
        assert answer["headers"]["content-encoding"] == "gzip"
        assert gzip.decompress(base64.b64decode(answer["body"])).decode() == plain["body"]
    for accept in ("br", "gzip;q=0", "identity"):
        assert function.handle(event(**{"Accept-Encoding": accept}))["body"] == plain["body"]


def test_npz(function, model) -> None:
    body = {"params": {"include": ["mean", "contacts", "logits"]}, "items": [{"sequence": "MKTFF"}] * 2}
    answer = function.handle(v2(body=body, accept="application/x-npz"))
    assert answer["headers"]["content-type"] == "application/x-npz"
    arrays = np.load(io.BytesIO(base64.b64decode(answer["body"])))
    expected = model.encode(["MKTFF"], include=["mean", "contacts", "logits"])[0]
    np.testing.assert_array_equal(arrays["mean_6"], [expected.embeddings[6]] * 2)
    np.testing.assert_array_equal(arrays["contacts_1"], expected.contacts)
    assert "".join(arrays["vocab_tokens"]) == "LAGVSERTIDPKQNFYMHWC"


def test_other_routes(function) -> None:
    assert json.loads(function.handle(v2("/healthz", None, "GET"))["body"]) == {"status": "ok"}
    assert json.loads(function.handle(v1("/readyz/", None, "GET"))["body"])["models"] == ["esm2-8m"]
    (described,) = json.loads(function.handle(v2("/api/v3/models/", None, "GET"))["body"])["models"]
    assert described["synthetic"] is True
    for action in ("encode", "predict", "log_prob"):
        answer = function.handle(v2(f"/api/v3/schema/esm2-8m/{action}/", None, "GET"))
        assert json.loads(answer["body"])["properties"]["items"]["maxItems"] == 8


def test_every_answer_says_synthetic_and_has_the_request_id(function) -> None:
    class Context:
        aws_request_id = "abc-1"

    for event in (v2(), v2("/nothing"), {}):
        headers = function.handle(event, Context())["headers"]
        assert "synthetic" in headers["x-numpyesm-weights"]
        assert headers["x-request-id"] == "abc-1"


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "status", "code"),
    [
        (v2("/"), 404, "user.not_found"),
        (v2("/api/v2/esm2-8m/encode"), 404, "user.not_found"),
        (v2("/api/v3/esm2-8m/encode/x"), 404, "user.not_found"),
        (v2("/api/v3/esm2-35m/encode"), 404, "user.not_found"),
        (v2("/api/v3/esm2-8m/generate"), 404, "user.not_found"),
        (v2("/a/b/api/v3/esm2-8m/encode"), 404, "user.not_found"),
        (v2(method="GET"), 405, "user.method_not_allowed"),
        (v2("/healthz", method="DELETE"), 405, "user.method_not_allowed"),
        (v2(**{"content-type": "text/plain"}), 415, "user.media_type"),
        (v2(**{"content-encoding": "br"}), 415, "user.media_type"),
        (v2(body=""), 422, "user.validation"),
        (v2(body=None), 422, "user.validation"),
        (v2(body="{"), 422, "user.validation"),
        (v2(body="[" * 100_000), 422, "user.validation"),
        (v2(body='{"items": NaN}'), 422, "user.validation"),
        (v2(body='{"items": [], "items": []}'), 422, "user.validation"),
        (v2(body="[]"), 422, "user.validation"),
        (v2(body={"items": []}), 422, "user.validation"),
        (v2(body={"items": [{"sequence": "M"}] * 9}), 422, "user.validation"),
        (v2(body={"items": [{"sequence": "\ud800"}]}), 422, "user.validation"),
        (v2(body={"items": [{"sequence": "M" * 2049}]}), 422, "user.validation"),
        (v2(body={"params": {"repr_layers": []}, **ITEMS}), 422, "user.validation"),
        (v2(body=" " * 3_000_000), 413, "user.too_large"),
        (packed(v2(**{"content-encoding": "gzip"}), gzip.compress(b" " * (1 << 28), 9)), 413, "user.too_large"),
        (packed(v2(**{"content-encoding": "gzip"}), gzip.compress(b"{}")[:-9]), 422, "user.validation"),
        (packed(v2(**{"content-encoding": "gzip"}), b"plain"), 422, "user.validation"),
        (packed(v2(**{"content-encoding": "gzip"}), gzip.compress(b"") * 20), 422, "user.validation"),
        (v2() | {"isBase64Encoded": True, "body": "***"}, 422, "user.validation"),
        ({}, 400, "user.bad_request"),
        (None, 400, "user.bad_request"),
        ({"version": "2.0", "rawPath": 7, "requestContext": {"http": {"method": "POST"}}}, 400, "user.bad_request"),
        ({"httpMethod": "POST", "path": "/healthz", "body": {}}, 400, "user.bad_request"),
    ],
)
def test_refusals(function, event, status, code) -> None:
    answer = function.handle(event)
    error = error_of(answer)
    assert (answer["statusCode"], error["code"]) == (status, code), error


def test_every_bad_item_is_named(function) -> None:
    items = [{"sequence": s} for s in ("MKT", "mkt", "", "M*")]
    error = error_of(function.handle(v2(body={"items": [*items, {"name": "x"}]})))
    assert list(error["error"]) == [
        "items__1__sequence", "items__2__sequence", "items__3__sequence", "items__4__sequence", "items__4__name"
    ]  # fmt: skip
    assert "position 1" in error["error"]["items__1__sequence"][0]


def test_keys(function, monkeypatch) -> None:
    monkeypatch.setenv("NUMPYESM_API_KEYS", "first,second")
    for wrong in ({}, {"authorization": "Token third"}, {"authorization": "Bearer first"}, {"authorization": "Token"}):
        answer = function.handle(v2(**wrong))
        assert answer["statusCode"] == 401
        assert answer["headers"]["www-authenticate"].startswith("Token")
        assert error_of(answer)["code"] == "user.authentication"
    for event in (v2(authorization="Token second"), v1(Authorization="token first")):
        assert function.handle(event)["statusCode"] == 200
    assert function.handle(v2("/healthz", None, "GET"))["statusCode"] == 200
    assert function.handle(v2("/api/v3/models", None, "GET"))["statusCode"] == 401


def test_a_failure_inside_leaks_nothing(function, model, monkeypatch) -> None:
    monkeypatch.setattr(ESM2, "encode", lambda *_: 1 / 0)
    answer = function.handle(v2())
    assert answer["statusCode"] == 500
    assert error_of(answer)["detail"] == "internal error"


def test_a_result_that_json_cannot_say_is_an_error(function, model, monkeypatch) -> None:
    result = model.encode(["MKT"])
    result[0].embeddings[6][3] = np.nan
    monkeypatch.setattr(ESM2, "encode", lambda *_: result)
    assert function.handle(v2())["statusCode"] == 500


# -- limits --------------------------------------------------------------------------------------------------------


class Context:
    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds

    def get_remaining_time_in_millis(self) -> int:
        return max(0, int((self.ends - time.monotonic()) * 1000))


def test_an_alarm_rings_in_the_midst_of_the_work(function, monkeypatch) -> None:
    done = []
    monkeypatch.setattr(ESM2, "encode", lambda *_: [time.sleep(0.01) for _ in range(6000)] and done.append(1))
    answer = function.handle(v2(), Context(0.6))
    assert answer["statusCode"] == 503
    assert error_of(answer)["code"] == "server.deadline"
    assert answer["headers"]["retry-after"]
    assert not done
    monkeypatch.undo()
    assert function.handle(v2(), Context(60))["statusCode"] == 200


def test_without_an_alarm_the_clock_is_read_between_items(function, model, monkeypatch) -> None:
    """In a thread, where no signal arrives."""
    calls: list[list[str]] = []
    encode = ESM2.encode

    def slow(self, sequences, *rest):
        calls.append(sequences)
        time.sleep(0.2)
        return encode(self, sequences, *rest)

    monkeypatch.setattr(ESM2, "encode", slow)
    answers = []
    body = {"items": [{"sequence": "MKT"}] * 8}
    thread = threading.Thread(target=lambda: answers.append(function.handle(v2(body=body), Context(0.75))))
    thread.start()
    thread.join()
    assert answers[0]["statusCode"] == 503
    assert 1 <= len(calls) < 8
    assert all(len(call) == 1 for call in calls)


def test_what_is_hopeless_is_not_begun(function, monkeypatch) -> None:
    function._pace.note([100], False, 10.0)
    monkeypatch.setattr(ESM2, "encode", lambda *_: pytest.fail("it was begun"))
    answer = function.handle(v2(body={"items": [{"sequence": "M" * 500}]}), Context(5))
    assert answer["statusCode"] == 503
    assert "takes about" in error_of(answer)["detail"]


def test_the_pace_recovers_from_a_slow_start() -> None:
    pace = deadline.Pace()
    assert pace.expect([2000], True) == 0
    pace.note([30], False, 9.0)
    pace.note([100], False, 0.1)
    assert pace.expect([100], False) == pytest.approx(0.1)
    assert pace.expect([2000], False) < 5
    assert pace.expect([2000], True) > pace.expect([2000], False)


def test_one_slow_request_does_not_close_the_function(function) -> None:
    """A container that is slow at first, then only asked for long sequences: nothing would correct its estimate."""
    function._pace.note([100], False, 1000.0)
    body = {"items": [{"sequence": "M" * 500}]}
    statuses = [function.handle(v2(body=body), Context(30))["statusCode"] for _ in range(10)]
    assert statuses[0] == 503
    assert statuses[-1] == 200
    assert function._pace.expect([502], False) < 30


def test_a_short_request_tells_little_about_a_long_one() -> None:
    pace = deadline.Pace()
    pace.note([5], False, 1.0)
    assert pace.expect([2050] * 8, False) < 20
    pace.note([2050], False, 9.0)
    assert 70 < pace.expect([2050] * 8, False) < 75


def test_a_mask_is_one_residue(function, monkeypatch, capsys) -> None:
    """Six characters, but no six residues: neither for the estimate nor in the log."""
    seen = []
    monkeypatch.setattr(deadline.Pace, "expect", lambda _, lengths, dear: seen.append(lengths) or 0.0)
    body = {"items": [{"sequence": "<mask>" * 200}, {"sequence": "MK<mask>"}]}
    assert function.handle(v2("/api/v3/esm2-8m/predict/", body))["statusCode"] == 200
    assert seen == [[202, 5]]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["residues"] == 203


def test_too_large_an_answer(function, monkeypatch) -> None:
    big = {"params": {"include": ["contacts"]}, "items": [{"sequence": "M" * 2048}]}
    monkeypatch.setattr(ESM2, "encode", lambda *_: pytest.fail("computed for nothing"))
    for accept in ({}, {"accept-encoding": "gzip"}, {"accept": "application/x-npz"}):
        answer = function.handle(v2(body=big, **accept))
        assert answer["statusCode"] == 413
        error = error_of(answer)
        assert error["code"] == "user.answer_too_large"
        assert "fewer" in error["detail"]
        assert {"params", "items"} == set(error["error"])


def test_too_little_memory_is_an_answer(function, model, monkeypatch) -> None:
    from numpyesm.memory import MemoryBudget

    monkeypatch.setattr(model.passes, "budget", MemoryBudget(1 << 20, 1 << 20, model.config, 1))
    answer = function.handle(v2())
    assert answer["statusCode"] == 413
    assert "max_memory" in error_of(answer)["detail"]


# -- the process, the package --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("memory", "threads"), [("512", 1), ("1769", 1), ("3538", 2), ("10240", 4)])
def test_threads_follow_the_memory_that_is_paid_for(monkeypatch, memory, threads) -> None:
    from numpyesm.serverless import function as module

    monkeypatch.setattr(module, "default_threads", lambda: 4)
    monkeypatch.delenv("NUMPYESM_THREADS", raising=False)
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", memory)
    assert module._threads() == threads
    assert module._memory() == (int(memory) << 20) - module._KEPT_BACK


@pytest.mark.parametrize(
    ("setting", "chosen"),
    [
        ("esm2-8m", (None, "esm2-8m")),
        ("mine=weights/a.safetensors", ("mine", "weights/a.safetensors")),
        ("mine=/mnt/lr=1e-4/a.safetensors", ("mine", "/mnt/lr=1e-4/a.safetensors")),
    ],
)
def test_the_model_is_chosen_by_a_variable(monkeypatch, setting, chosen) -> None:
    from numpyesm.serverless import function as module

    monkeypatch.setenv("NUMPYESM_MODEL", setting)
    assert module._chosen_model() == chosen


@pytest.mark.parametrize("setting", ["mine=", "=", "=a.safetensors", "My Model=a", "a/b=a"])
def test_a_slug_that_no_address_can_have_is_refused(monkeypatch, setting) -> None:
    from numpyesm.errors import InvalidOption
    from numpyesm.serverless import function as module

    monkeypatch.setenv("NUMPYESM_MODEL", setting)
    with pytest.raises(InvalidOption, match="slug"):
        module._chosen_model()


def test_empty_variables_are_as_if_not_set(monkeypatch) -> None:
    """As templates leave them."""
    for name in ("NUMPYESM_BACKEND", "NUMPYESM_PRECISION", "NUMPYESM_THREADS", "NUMPYESM_API_KEYS"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("NUMPYESM_MODEL", "esm2-8m=synthetic:esm2-8m")
    assert Function().handle(v2())["statusCode"] == 200


def test_nothing_of_the_service_or_of_numba_is_loaded() -> None:
    code = f"""
import json, os, sys
os.environ |= {{"NUMPYESM_MODEL": "synthetic:esm2-8m", "NUMPYESM_BACKEND": "numpy"}}
from numpyesm.serverless import handler
assert handler(json.loads({json.dumps(json.dumps(v2()))}))["statusCode"] == 200
names = {{m.split(".")[0] for m in sys.modules}}
heavy = {{"fastapi", "pydantic", "starlette", "uvicorn", "orjson", "asyncio", "numba", "huggingface_hub", "requests"}}
print(sorted(names & heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    loaded, request = (json.loads(line) for line in done.stdout.splitlines()[:2])
    assert loaded["event"] == "loaded"
    assert request["status"] == 200
    assert "SYNTHETIC" in done.stderr


def build(tmp_path: Path, name: str, *options: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    path = tmp_path / name
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, ROOT / "tools/build_lambda.py", "--weights", "synthetic:esm2-8m", "--python", version]
    done = subprocess.run([*command, "-o", path, *options], capture_output=True, text=True, timeout=300, cwd=ROOT)
    if "pip found no wheels" in done.stderr:
        pytest.skip("the package registry cannot be reached")
    return done, path


@pytest.mark.skipif(sys.platform != "linux", reason="runs the wheels that it packs")
def test_the_zip(tmp_path) -> None:
    done, path = build(tmp_path, "one.zip", "--dtype", "int8")
    assert done.returncode == 0, done.stderr
    assert "together" in done.stdout
    assert "numpy.libs" in done.stdout
    assert "SYNTHETIC" in done.stderr
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert sum(info.file_size for info in archive.infolist()) < 120e6
        archive.extractall(tmp_path / "task")
    assert not [n for n in names if "/tests/" in n or n.endswith(".pyi")]
    assert "weights/weights.safetensors" in names
    assert [n for n in names if n.endswith(".pyc")]
    again, other = build(tmp_path, "two.zip", "--dtype", "int8")
    assert again.returncode == 0
    assert other.read_bytes() == path.read_bytes()
    # As Lambda runs it: only what is in the zip, nothing can be written.
    code = f"""
import json, sys
sys.path.insert(0, {str(tmp_path / "task")!r})
from numpyesm.serverless import handler
answer = handler(json.loads({json.dumps(json.dumps(v2()))}))
assert answer["statusCode"] == 200, answer
import numpy
assert numpy.__file__.startswith({str(tmp_path / "task")!r})
"""
    environment = {"AWS_LAMBDA_FUNCTION_NAME": "f", "LAMBDA_TASK_ROOT": str(tmp_path / "task")}
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_a_zip_that_lambda_would_refuse_is_not_made(tmp_path) -> None:
    done, path = build(tmp_path, "large.zip", "--limit", "60000000")
    assert done.returncode == 1
    assert "Lambda takes 60.0 MB" in done.stderr
    assert "numpy.libs" in done.stdout
    assert not path.exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-o", "."], "is a folder"),
        (["-o", "/proc/numpyesm.zip"], "/proc/numpyesm.zip cannot be written"),
        (["--python", "3.9"], "needs 3.10 or newer"),
        (["--python", "312"], "needs 3.10 or newer"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_cannot_become_a_zip_is_said_before_the_work(tmp_path, options, reason) -> None:
    command = [sys.executable, ROOT / "tools/build_lambda.py", "--weights", "none", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 1
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_function_of_too_little_memory_says_how_much_it_has(monkeypatch, tmp_path) -> None:
    from numpyesm.weights import convert

    path = convert("synthetic:esm2-8m", tmp_path / "w.safetensors", dtype="fp16").path
    monkeypatch.setenv("NUMPYESM_MODEL", str(path))
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "60")
    answer = Function().handle(v2())
    assert answer["statusCode"] == 503
    detail = error_of(answer)["detail"]
    assert "60 MB, of which 56 MB are kept" in detail
    assert "stored as int8 take less" in detail
