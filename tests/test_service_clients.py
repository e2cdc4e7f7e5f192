"""Today's clients of the hosted API, pointed here: the `biolmai` SDK, curl, requests, R's httr."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from conftest import random_sequence
from running_service import ServiceHere, items, same, serving_here

from numpyesm import ESM2

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SDK_VERSION = "0.4.0"
KEY = "a-key-of-ours"

# The bodies that the hosted API's documentation shows.
ENCODE = {"params": {"repr_layers": [-1], "include": ["mean"]}, "items": items("MSILVTRPSPAGEEL")}
ENCODE_MORE = {
    "params": {"include": ["mean", "contacts", "logits", "attentions"]},
    "items": items("MAETAVINHKKRKNSPRIVQ"),
}
PREDICT = {"items": items("MKTFFV<mask>LVLLLSGALAAPVA", "ACDEFGHIKLMNPQRSTVWY<mask>")}


@pytest.fixture(scope="module")
def service(loaded: ESM2) -> Iterator[ServiceHere]:
    with serving_here({"esm2-35m": loaded}, [KEY]) as running:
        yield running


# -- the SDK ---------------------------------------------------------------------------------------------------------

SDK_SCRIPT = """
import asyncio, json, sys
from biolmai import BioLM
from biolmai.client import BioLMApi, BioLMApiClient

asked = json.load(sys.stdin)
sync = BioLMApi("esm2-35m", api_key=asked["key"])
out = {
    "encode": sync.encode(items=asked["items"], params={"include": ["mean", "contacts"], "repr_layers": [-1, 1]}),
    "predict": sync.predict(items=asked["masked"], params={"positions": "masked"}),
    "log_prob": sync.call("log_prob", asked["items"][:8]),
    "one_bad": sync.encode(items=asked["one_bad"]),
    "one_bad_in_its_batch": BioLMApi("esm2-35m", api_key=asked["key"], retry_error_batches=False).encode(
        items=asked["one_bad"]),
    "wrong_key": BioLMApi("esm2-35m", api_key="no").encode(items=asked["items"][:2]),
    "one_off": BioLM(entity="esm2-35m", action="encode", type="sequence", items="MSILV", api_key=asked["key"]),
    "max_items": sync.extract_max_items(sync.schema("esm2-35m", "encode")),
}

async def main():
    client = BioLMApiClient("esm2-35m", api_key=asked["key"])
    encoded, predicted, scores = await asyncio.gather(
        client.encode(items=asked["items"], params={"include": ["mean", "contacts"], "repr_layers": [-1, 1]}),
        client.predict(items=asked["masked"]),
        client._batch_call_autoschema_or_manual("log_prob", asked["items"]),
    )
    await client.shutdown()
    return {"async_encode": encoded, "async_predict": predicted, "async_log_prob": scores}

out |= asyncio.run(main())
print(json.dumps(out))
"""


@pytest.fixture(scope="session")
def sdk() -> Path:
    """A Python that has the SDK, in an environment of its own: it would pull other versions into ours."""
    folder = ROOT / f".venv-biolmai-{SDK_VERSION}-py{sys.version_info.major}{sys.version_info.minor}"
    python, done = folder / "bin" / "python", folder / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", f"biolmai=={SDK_VERSION}"], check=True)
        done.touch()
    return python


def run_sdk(command: list[str], folder: Path, asked: Any = None, **variables: str) -> str:
    """stdout of a program that uses the SDK."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)} | variables
    environment["BIOLMAI_THREADS"] = "1"  # its default of 16 does not import on machines of less than four CPUs
    done = subprocess.run(
        command, input=json.dumps(asked), capture_output=True, text=True, timeout=300, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.network
def test_sdk(service: ServiceHere, loaded: ESM2, sdk: Path, tmp_path: Path) -> None:
    sequences = [random_sequence(5 + 3 * i, i) for i in range(40)]
    masked = [sequence[:2] + "<mask>" + sequence[2:] for sequence in sequences[:20]]
    asked = {
        "key": KEY,
        "items": items(*sequences),
        "masked": items(*masked),
        "one_bad": items(*sequences[:13], "MK1T", *sequences[14:]),
    }
    command = [str(sdk), "-c", SDK_SCRIPT]
    got = json.loads(run_sdk(command, tmp_path, asked, BIOLMAI_BASE_API_URL=f"{service.url}/api/v3"))
    assert got["max_items"] == 8

    encoded = [result.to_dict() for result in loaded.encode(sequences, [-1, 1], ["mean", "contacts"])]
    for name in ("encode", "async_encode"):
        # The SDK sends batches of eight: an index is that in the batch.
        assert [result["sequence_index"] for result in got[name]] == [i % 8 for i in range(40)]
        same([result | {"sequence_index": i} for i, result in enumerate(got[name])], encoded)
    same(got["predict"], [result.to_dict() for result in loaded.predict(masked, "masked")])
    same(got["async_predict"], [result.to_dict() for result in loaded.predict(masked)])
    scores = [{"log_prob": score} for score in loaded.log_prob(sequences).tolist()]
    same(got["log_prob"], scores[:8])
    same(got["async_log_prob"], scores)
    assert got["one_off"]["sequence_index"] == 0

    bad = got["one_bad"].pop(13)
    assert bad["status_code"] == 422
    assert "'1' at position 3" in bad["error"]["items__0__sequence"][0]
    assert all("embeddings" in result for result in got["one_bad"])
    # Without its retries the whole batch of eight fails, and the answer names the one that is to blame.
    errors = [list(result.get("error", ())) for result in got["one_bad_in_its_batch"]]
    assert errors == [["items__5__sequence"] if 8 <= i < 16 else [] for i in range(40)]
    assert [result["status_code"] for result in got["wrong_key"]] == [401, 401]


@pytest.mark.network
def test_sdk_lists_and_shows_models(service: ServiceHere, sdk: Path, tmp_path: Path) -> None:
    for command in (["list"], ["show", "esm2-35m", "--include-schemas"]):
        program = [str(sdk.with_name("biolmai")), "model", *command, "--format", "json", "-o", "out.json"]
        run_sdk(program, tmp_path, BIOLMAI_BASE_DOMAIN=service.url, BIOLMAI_TOKEN=KEY)
        shown = json.loads((tmp_path / "out.json").read_text())
        model = shown[0] if command == ["list"] else shown
        assert model["model_slug"] == "esm2-35m"
        assert model["actions"] == ["encode", "predict", "log_prob"]
    assert set(shown["schemas"]) == {"encode", "predict", "log_prob"}


# -- curl, requests, R -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("action", "body"), [("encode", ENCODE), ("encode", ENCODE_MORE), ("predict", PREDICT)])
def test_curl_and_requests(service: ServiceHere, loaded: ESM2, action: str, body: dict[str, Any]) -> None:
    url = f"{service.url}/api/v3/esm2-35m/{action}/"
    headers = {"Authorization": f"Token {KEY}", "Content-Type": "application/json"}
    response = requests.request("POST", url, headers=headers, data=json.dumps(body), timeout=60)
    assert response.history == []
    check_answer(response.json(), loaded, action, body)
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "--silent", "--show-error", "--fail-with-body", "--location", "--compressed", url]
    for name, value in headers.items():
        command += ["--header", f"{name}: {value}"]
    done = subprocess.run([*command, "--data", json.dumps(body, indent=4)], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    check_answer(json.loads(done.stdout), loaded, action, body)


def test_r(service: ServiceHere, loaded: ESM2) -> None:
    first, second = (item["sequence"] for item in PREDICT["items"])
    script = f"""
if (!suppressWarnings(require(httr, quietly = TRUE))) quit(status = 77)
url <- "{service.url}/api/v3/esm2-35m/predict/"
headers <- c("Authorization" = "Token {KEY}", "Content-Type" = "application/json")
body <- list(items = list(list(sequence = "{first}"), list(sequence = "{second}")))
res <- POST(url, add_headers(.headers = headers), body = body, encode = "json")
stopifnot(status_code(res) == 200)
cat(content(res, as = "text", encoding = "UTF-8"))
"""
    program = shutil.which("Rscript")
    done = program and subprocess.run([program, "-e", script], capture_output=True, text=True, timeout=120)
    if not done or done.returncode == 77:
        pytest.skip("R with httr is not installed (apt-get install r-cran-httr)")
    assert done.returncode == 0, done.stderr
    check_answer(json.loads(done.stdout), loaded, "predict", PREDICT)


def check_answer(answer: Any, model: ESM2, action: str, body: dict[str, Any]) -> None:
    """Equal to the library's."""
    sequences = [item["sequence"] for item in body["items"]]
    results = model.predict(sequences) if action == "predict" else model.encode(sequences, **body["params"])
    same(answer, {"results": [result.to_dict() for result in results]})
