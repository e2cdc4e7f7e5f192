"""The Lambda handler: events, limits, what a process loads and says, the zip. Requests of both doors: test_api.py."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import random_sequence
from running_service import Answer, answer_of, check_error, items, same, url_event

from numpyesm import ESM2
from numpyesm.api.catalog import Catalog
from numpyesm.errors import InvalidOption
from numpyesm.passes import Passes
from numpyesm.serverless.function import Function
from numpyesm.weights import convert
from tools.build_lambda import main as build_lambda

pytestmark = pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning")
ROOT = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="Lambda is Linux")
ITEMS = {"items": items("MKTFF")}
PACKED = gzip.compress(json.dumps(ITEMS).encode())


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch) -> None:
    for name in [name for name in os.environ if name.startswith(("NUMPYESM_", "AWS_", "LAMBDA_"))]:
        monkeypatch.delenv(name)


@pytest.fixture
def function(model) -> Function:
    return Function(Catalog({"esm2-8m": model}))


def v2(path="/api/v3/esm2-8m/encode/", body=ITEMS, method="POST", stage="$default", **headers):
    return url_event(path, body, method, stage, **{"content-type": "application/json", **headers})


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


def context(seconds: float = 60.0):
    """What Amazon's runtime client hands over with an event, so many seconds before the function's time is up."""
    client = pytest.importorskip("awslambdaric.lambda_context")
    return client.LambdaContext("request-1", {}, None, int((time.time() + seconds) * 1000))


def ask(function: Function, event, context=None) -> Answer:
    document = function.handle(event, context)
    assert len(json.dumps(document)) <= 6 * 1024 * 1024  # Lambda refuses what is larger: the function has then failed
    return answer_of(document)


@pytest.mark.parametrize(
    "event",
    [
        *(v2(f"/{path}/esm2-8m/encode/") for path in ("api/v3", "api/v1", "base/api/v3")),
        v2("/api/v3/esm2-8m/encode"),
        *(v2(f"/prod{path}/api/v3/esm2-8m/encode", stage="prod") for path in ("", "/base")),
        *(v2(f"{path}/api/v3/esm2-8m/encode", stage="api") for path in ("", "/api")),
        *(v1(f"/{path}/esm2-8m/encode/") for path in ("api/v3", "base/api/v3")),
        v1("/api/v1/esm2%2D8m/encode"),
        {k: v for k, v in v1().items() if k != "multiValueHeaders"},
        {k: v for k, v in v1().items() if k != "headers"},
        v2(body=json.dumps(ITEMS).encode()),
        v2(body=PACKED, **{"content-encoding": "gzip"}),
        v1(**{"Content-Encoding": "GZIP"}) | {"body": base64.b64encode(PACKED).decode(), "isBase64Encoded": True},
    ],
)
def test_every_kind_of_event_gets_the_same_answer(function, event) -> None:
    """As a function URL's, which test_api.py compares with the library's."""
    answer = ask(function, event)
    assert answer.status_code == 200, answer.content
    assert answer == ask(function, v2())._replace(headers=answer.headers)


def test_health_and_what_every_answer_has(function) -> None:
    assert ask(function, v1("/readyz/", None, "GET")).json() == {"status": "ready", "models": ["esm2-8m"]}
    for event in (v2(), v2("/nothing"), {}):
        headers = ask(function, event, context()).headers
        assert "synthetic" in headers["x-numpyesm-weights"]
        assert headers["x-request-id"] == "request-1"


@pytest.mark.parametrize(
    ("event", "status", "code"),
    [
        (v2("/a/b/api/v3/esm2-8m/encode"), 404, "user.not_found"),
        (v2(body=None), 422, "user.validation"),
        (v2(body=" " * 3_000_000), 413, "user.too_large"),
        (v2() | {"isBase64Encoded": True, "body": "***"}, 422, "user.validation"),
        ({}, 400, "user.bad_request"),
        (None, 400, "user.bad_request"),
        ({"version": "2.0", "rawPath": 7, "requestContext": {"http": {"method": "POST"}}}, 400, "user.bad_request"),
        ({"httpMethod": "POST", "path": "/healthz", "body": {}}, 400, "user.bad_request"),
    ],
)
def test_refusals(function, event, status, code) -> None:
    assert check_error(ask(function, event), status)["code"] == code


def test_too_large_an_answer_is_not_computed(function, monkeypatch) -> None:
    big = {"params": {"include": ["contacts"]}, "items": items("M" * 2048)}
    monkeypatch.setattr(Passes, "encode", lambda *_: pytest.fail("computed for nothing"))
    for accept in ({}, {"accept-encoding": "gzip"}, {"accept": "application/x-npz"}):
        error = check_error(ask(function, v2(body=big, **accept)), 413, "params", "items")
        assert error["code"] == "user.answer_too_large"


KEPT_BACK = 56 << 20
SIZE = "AWS_LAMBDA_FUNCTION_MEMORY_SIZE"


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, {"source": None, "backend": "auto", "precision": "fp32", "max_memory": None}),
        ({"NUMPYESM_MODEL": "esm2-8m"}, {"source": "esm2-8m"}),
        ({"NUMPYESM_MODEL": "mine=/mnt/lr=1e-4/a"}, {"source": "/mnt/lr=1e-4/a"}),
        ({"NUMPYESM_BACKEND": "numpy", "NUMPYESM_PRECISION": "int8"}, {"backend": "numpy", "precision": "int8"}),
        # Templates leave variables empty: as if not set.
        (dict.fromkeys(["NUMPYESM_BACKEND", "NUMPYESM_PRECISION", "NUMPYESM_THREADS", "NUMPYESM_MODEL"], ""),
         {"source": None, "backend": "auto", "precision": "fp32", "threads": None}),
        # One thread for each whole CPU that the memory pays for.
        *(({SIZE: memory}, {"threads": threads, "max_memory": (int(memory) << 20) - KEPT_BACK})
          for memory, threads in (("512", 1), ("1769", 1), ("3538", 2), ("10240", 4))),
        ({SIZE: "512", "NUMPYESM_THREADS": "2"}, {"threads": None}),
    ],
)  # fmt: skip
def test_variables_choose_the_model(monkeypatch, tmp_path, model, variables, asked) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("numpyesm.serverless.function.default_threads", lambda: 4)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    got = {}

    def load(source, **options):
        got.update(options, source=source)
        return model

    monkeypatch.setattr(ESM2, "from_pretrained", load)
    named = variables.get("NUMPYESM_MODEL", "").startswith("mine=")
    assert Function().load().slugs == ["mine" if named else model.name]
    assert {name: got.get(name) for name in asked} == asked


@pytest.mark.parametrize("setting", ["mine=", "=", "=a.safetensors", "My Model=a", "a/b=a"])
def test_a_slug_that_no_address_can_have_is_refused(monkeypatch, setting) -> None:
    monkeypatch.setenv("NUMPYESM_MODEL", setting)
    with pytest.raises(InvalidOption, match="slug"):
        Function().load()


def test_a_function_of_too_little_memory_says_how_much_it_has(monkeypatch, tmp_path) -> None:
    path = convert("synthetic:esm2-8m", tmp_path / "w.safetensors", dtype="fp16").path
    monkeypatch.setenv("NUMPYESM_MODEL", str(path))
    monkeypatch.setenv(SIZE, "60")
    error = check_error(ask(Function(), v2()), 503)
    assert "60 MB, of which 56 MB are kept" in error["detail"]
    assert "stored as int8 take less" in error["detail"]


@pytest.mark.slow
def test_nothing_of_the_service_or_of_numba_is_loaded() -> None:
    code = f"""
import os, sys
os.environ |= {{"NUMPYESM_MODEL": "synthetic:esm2-8m", "NUMPYESM_BACKEND": "numpy", "AWS_LAMBDA_FUNCTION_NAME": "f"}}
from numpyesm.serverless import handler
print("null")
assert handler({v2("/api/v3/esm2-8m/predict", {"items": items("MKTFF<mask>")})!r})["statusCode"] == 200
names = {{m.split(".")[0] for m in sys.modules}}
heavy = {{"starlette", "uvicorn", "asyncio", "numba", "huggingface_hub", "requests"}}
print(sorted(names & heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    loaded, _, request = (json.loads(line) for line in done.stdout.splitlines()[:3])
    assert (loaded["event"], request["status"], request["residues"]) == ("loaded", 200, 6)
    assert "SYNTHETIC" in done.stderr


@pytest.mark.slow
@pytest.mark.network
@linux
def test_the_zip(tmp_path, capfd) -> None:
    """It is not made if Lambda would refuse it; made twice it is the same; it runs as Lambda runs it."""
    paths = [tmp_path / name for name in ("large.zip", "one.zip", "two.zip")]
    common = ["--weights", "synthetic:esm2-8m", "--dtype", "int8", "--python", "{}.{}".format(*sys.version_info)]
    codes = [build_lambda([*common, "--limit", "30000000", "-o", str(paths[0])])]
    codes += [build_lambda([*common, "-o", str(path)]) for path in paths[1:]]
    out, err = capfd.readouterr()
    if "pip found no wheels" in err:
        pytest.skip("the package registry cannot be reached")
    assert codes == [1, 0, 0], err
    for said, where in (("together", out), ("numpy.libs", out), ("SYNTHETIC", err), ("Lambda takes 30.0 MB", err)):
        assert said in where
    assert not paths[0].exists()
    assert paths[1].read_bytes() == paths[2].read_bytes()
    with zipfile.ZipFile(paths[1]) as archive:
        names = archive.namelist()
        assert sum(info.file_size for info in archive.infolist()) < 120e6
        archive.extractall(tmp_path / "task")
    assert not [n for n in names if "/tests/" in n or n.endswith(".pyi")]
    assert "weights/weights.safetensors" in names
    assert [n for n in names if n.endswith(".pyc")]
    # Only what is in the zip, nothing can be written.
    task = str(tmp_path / "task")
    code = f"""
import sys
sys.path.insert(0, {task!r})
from numpyesm.serverless import handler
answer = handler({v2()!r})
assert answer["statusCode"] == 200, answer
import numpy
assert numpy.__file__.startswith({task!r})
"""
    environment = {"AWS_LAMBDA_FUNCTION_NAME": "f", "LAMBDA_TASK_ROOT": task}
    ran = subprocess.run([sys.executable, "-I", "-S", "-c", code], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["-o", "."], "is a folder"),
        (["-o", "/proc/numpyesm.zip"], "/proc/numpyesm.zip cannot be written"),
        (["--python", "3.9"], "needs 3.10 or newer"),
        (["--python", "312"], "needs 3.10 or newer"),
        (["--kernels", "/bin/sh", "--arch", "aarch64"], "/bin/sh is no library of kernels for Linux on aarch64"),
        (["--kernels", "/bin/sh"], "/bin/sh was built from other sources"),
    ],
)
@linux
def test_what_cannot_become_a_zip_is_said_before_the_work(tmp_path, monkeypatch, capfd, options, reason) -> None:
    monkeypatch.chdir(tmp_path)
    assert build_lambda(["--weights", "none", *options]) == 1
    err = capfd.readouterr().err
    assert reason in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_too_large_an_answer_is_refused_and_as_gzip_it_goes_through(function, model) -> None:
    sequences = [random_sequence(1000, i) for i in range(8)]
    document = {"params": {"include": ["per_token"]}, "items": items(*sequences)}
    assert "gzip" in check_error(ask(function, v2(body=document)), 413)["detail"]
    answer = ask(function, v2(body=document, **{"accept-encoding": "gzip"}))
    assert answer.status_code == 200, answer.content[:500]
    result = json.loads(gzip.decompress(answer.content))["results"][7] | {"sequence_index": 0}
    same(result, model.encode(sequences[7:], include=["per_token"])[0].to_dict())


@pytest.mark.slow
@linux
def test_a_time_out_that_is_near_is_answered(function) -> None:
    """Eight long proteins take seconds; with less than that left the answer says so, and comes in time."""
    document = {"params": {"include": ["attentions"]}, "items": items(*[random_sequence(2000)] * 8)}
    answer = ask(function, v2(body=document), context(seconds=0.4))
    refusal = check_error(answer, 503)
    assert refusal["code"] == "server.deadline"
    assert "fewer or shorter" in refusal["detail"]
    assert answer.headers["retry-after"]
    assert ask(function, v2(), context()).status_code == 200


def test_a_function_without_weights_says_so_when_it_starts(tmp_path: Path) -> None:
    nowhere = {"NUMPYESM_CACHE": str(tmp_path), "NUMPYESM_WEIGHTS": str(tmp_path / "none")}
    environment = os.environ | nowhere | {"AWS_LAMBDA_FUNCTION_NAME": "f", "LAMBDA_TASK_ROOT": str(tmp_path)}
    command = [sys.executable, "-c", "import numpyesm.serverless"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, env=environment)
    assert done.returncode == 1
    assert re.search("WeightsNotFound.*none", done.stderr)
