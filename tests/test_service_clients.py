"""The hosted API's own client, the `biolmai` SDK, pointed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import random_sequence
from running_service import ServiceHere, items, same, serving_here

from numpyesm import ESM2

pytestmark = [pytest.mark.slow, pytest.mark.network]
ROOT = Path(__file__).parents[1]
SDK_VERSION = "0.4.0"
KEY = "a-key-of-ours"


@pytest.fixture(scope="module")
def service(loaded: ESM2) -> Iterator[ServiceHere]:
    with serving_here({"esm2-35m": loaded}, [KEY]) as running:
        yield running


SDK_SCRIPT = """
import asyncio, json, sys
from biolmai import BioLM
from biolmai.client import BioLMApi, BioLMApiClient

asked = json.load(sys.stdin)
sync = BioLMApi("esm2-35m", api_key=asked["key"])
out = {
    "encode": sync.encode(items=asked["items"], params={"include": ["mean", "contacts"], "repr_layers": [-1, 1]}),
    "predict": sync.predict(items=asked["masked"], params={"positions": "masked"}),
    "one_bad": sync.encode(items=asked["one_bad"]),
    "one_bad_in_its_batch": BioLMApi("esm2-35m", api_key=asked["key"], retry_error_batches=False).encode(
        items=asked["one_bad"]),
    "wrong_key": BioLMApi("esm2-35m", api_key="no").encode(items=asked["items"][:2]),
    "one_off": BioLM(entity="esm2-35m", action="encode", type="sequence", items="MSILV", api_key=asked["key"]),
    "max_items": sync.extract_max_items(sync.schema("esm2-35m", "encode")),
}

async def main():
    client = BioLMApiClient("esm2-35m", api_key=asked["key"])
    predicted, scores = await asyncio.gather(
        client.predict(items=asked["masked"]), client._batch_call_autoschema_or_manual("log_prob", asked["items"]))
    await client.shutdown()
    return {"async_predict": predicted, "log_prob": scores}

print(json.dumps(out | asyncio.run(main())))
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
    # The SDK sends batches of eight: an index is that in the batch.
    assert [result["sequence_index"] for result in got["encode"]] == [i % 8 for i in range(40)]
    same([result | {"sequence_index": i} for i, result in enumerate(got["encode"])], encoded)
    same(got["predict"], [result.to_dict() for result in loaded.predict(masked, "masked")])
    same(got["async_predict"], [result.to_dict() for result in loaded.predict(masked)])
    scores = [{"log_prob": score} for score in loaded.log_prob(sequences).tolist()]
    same(got["log_prob"], scores)
    assert got["one_off"]["sequence_index"] == 0

    bad = got["one_bad"].pop(13)
    assert bad["status_code"] == 422
    assert "'1' at position 3" in bad["error"]["items__0__sequence"][0]
    assert all("embeddings" in result for result in got["one_bad"])
    # Without its retries the whole batch of eight fails, and the answer names the one that is to blame.
    errors = [list(result.get("error", ())) for result in got["one_bad_in_its_batch"]]
    assert errors == [["items__5__sequence"] if 8 <= i < 16 else [] for i in range(40)]
    assert [result["status_code"] for result in got["wrong_key"]] == [401, 401]


def test_sdk_lists_and_shows_models(service: ServiceHere, sdk: Path, tmp_path: Path) -> None:
    for command in (["list"], ["show", "esm2-35m", "--include-schemas"]):
        program = [str(sdk.with_name("biolmai")), "model", *command, "--format", "json", "-o", "out.json"]
        run_sdk(program, tmp_path, BIOLMAI_BASE_DOMAIN=service.url, BIOLMAI_TOKEN=KEY)
        shown = json.loads((tmp_path / "out.json").read_text())
        model = shown[0] if command == ["list"] else shown
        assert model["model_slug"] == "esm2-35m"
        assert model["actions"] == ["encode", "predict", "log_prob"]
    assert set(shown["schemas"]) == {"encode", "predict", "log_prob"}
