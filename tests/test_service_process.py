"""`numpyesm serve`: its options, and the process: signals, two hundred clients, memory; the hosted API's own SDK."""

from __future__ import annotations

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
from conftest import ALL, random_sequence
from running_service import ENCODE, GOOD, ServiceHere, check_error, items, same, serving

from numpyesm import ESM2, InvalidOption
from numpyesm.api.keys import read_keys
from numpyesm.config import ModelConfig
from numpyesm.service.server import bind
from numpyesm.weights import save_canonical
from numpyesm.weights.synthetic import random_checkpoint

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and limits")
HEAVY = {"params": {"include": ["mean", "contacts"]}, "items": items(*[random_sequence(768, i) for i in range(8)])}
EVERYTHING = {"repr_layers": [0, 1, 2, 3], "include": ALL}


@pytest.fixture(scope="module")
def weights(small_file: str) -> list[str]:
    return ["--model", f"esm2-35m={small_file}", "--backend", "numpy", "--threads", "1"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "--api-keys-file, or pass --allow-no-auth"),
        (["--api-keys-file", "empty"], "no key"),
        (["--api-keys-file", "absent"], "cannot be read"),
        (["--model", "ESM/2=synthetic"], "slug"),
        (["--model", "a=synthetic:esm2-8m", "--model", "a=synthetic:esm2-8m"], "twice"),
        (["--max-memory", "lots"], "--max-memory='lots'"),
        (["--max-memory", "30M"], "a memory limit of 30 MiB"),
        (["--host", "no.such.host.invalid"], "--host"),
        (["--port", "TAKEN"], "in use|taken"),
    ],
)
def test_wrong_use(run: Any, weights: list[str], options: list[str], reason: str) -> None:
    Path("empty").write_text("# none\n")
    (taken,) = bind("127.0.0.1", 0)
    with taken:
        options = [str(taken.getsockname()[1]) if option == "TAKEN" else option for option in options]
        done = run("serve", "--port", "0", *weights, *options, bare=True)
    assert done.code == 2
    assert re.search(reason, done.err)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"local_only": True, "max_body": 1 << 20, "deadline": 300}),
        (["--allow-host", "Proteins.Example"], {"local_only": True, "allowed_hosts": ("proteins.example",)}),
        (["--host", "0.0.0.0", "--allow-no-auth"], {"local_only": False}),
        (["--api-keys-file", "keys"], {"local_only": False}),
        (["--max-memory", "64GB", "--grace", "1"], {"max_memory": 64 * 10**9, "grace": 1}),
    ],
)
def test_options_reach_the_service(
    run: Any, weights: list[str], monkeypatch: pytest.MonkeyPatch, options: list[str], expected: dict[str, Any]
) -> None:
    """Without keys everybody is let in only if that is said."""
    made: list[Any] = []

    def server(service: Any, _: str) -> Any:
        return SimpleNamespace(run=lambda sockets: (made.append(service.settings), sockets[0].close()))

    monkeypatch.setattr("numpyesm.service.server.Server", server)
    Path("keys").write_text("first-key\n")
    assert run("serve", "--port", "0", *weights, *options, bare=True).code == 0
    assert {name: getattr(made[0], name) for name in expected} == expected


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbf# ours\n\nfirst-key\n  second-key  \n")  # with a byte order mark
    monkeypatch.setenv("NUMPYESM_API_KEYS", "third,fourth fifth")
    assert read_keys(file) == ["first-key", "second-key", "third", "fourth", "fifth"]
    file.write_text("# ours\ntwo keys\n")
    with pytest.raises(InvalidOption, match=r"line 2 .*blank"):
        read_keys(file)
    monkeypatch.setenv("NUMPYESM_API_KEYS", " , ")
    with pytest.raises(InvalidOption, match="no key"):
        read_keys(None)


@posix
@pytest.mark.slow
def test_keys_in_the_log_and_sigterm(weights: list[str], tmp_path: Path) -> None:
    """Keys are named by number; SIGTERM lets finish what runs and takes nothing new."""
    (tmp_path / "keys").write_text("first-key\n")
    options = ["--api-keys-file", str(tmp_path / "keys"), "--grace", "300"]
    with serving(*weights, *options, NUMPYESM_API_KEYS="other-key") as service:

        def post(key: str, body: Any = GOOD) -> requests.Response:
            # A service with keys may be reached under any name.
            return service.post(ENCODE, body, headers={"Authorization": f"Token {key}", "Host": "proteins.example"})

        assert post("first-key").status_code == 200
        check_error(service.post(ENCODE, GOOD), 401)
        for path in ("/healthz", "/readyz", "/", "/docs", "/openapi.json", "/metrics"):
            assert service.get(path).status_code == 200
        with service.connect(), ThreadPoolExecutor() as pool:  # an idle connection does not hold it up
            answer = pool.submit(post, "other-key", HEAVY)
            service.wait_until(lambda: service.metric("numpyesm_result_bytes") > 0)
            service.process.send_signal(signal.SIGTERM)
            service.wait_until(lambda: service.get("/readyz").status_code == 503)
            check_error(post("first-key"), 503)
            assert service.get("/healthz").status_code == 200
            assert len(answer.result(120).json()["results"]) == 8
            assert service.process.wait(60) == 0
        clients = [entry["client"] for entry in service.entries() if "slug" in entry]
        assert clients == ["key-1", "key-2"]
        everything = service.log() + service.talk()
        for secret in ("first-key", "other-key", "Traceback"):
            assert secret not in everything


@pytest.mark.slow
def test_two_hundred_clients(weights: list[str], loaded: ESM2) -> None:
    """Right answers, nothing leaks."""
    asked = []  # requests of several groups, each with what the library says to it alone
    for number in range(20):
        sequences = [random_sequence(1 + 3 * number, i) for i in range(1 + number % 4)]
        params = {"repr_layers": [number % 4, -1], "include": ["per_token", "mean"] if number % 2 else ["contacts"]}
        encoded = [result.to_dict() for result in loaded.encode(sequences, **params)]
        asked.append(({"params": params, "items": items(*sequences)}, {"results": encoded}))
    count = 200
    statuses: list[int] = []
    memory: list[int] = []
    with serving(*weights) as service:
        files = Path(f"/proc/{service.process.pid}/fd")
        threads, descriptors = service.status("Threads"), len(list(files.iterdir()))

        def client(number: int) -> None:
            chosen = random.Random(number)
            with requests.Session() as http:
                for _ in range(3):
                    body, expected = chosen.choice(asked)
                    response = http.post(f"{service.url}/api/v3/{ENCODE}", json=body, timeout=300)
                    statuses.append(response.status_code)
                    if response.status_code == 200:
                        same(response.json(), expected)
                    else:
                        assert int(response.headers["retry-after"]) >= 1
                    memory.append(service.status("VmRSS"))

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(client, range(count)))
        assert set(statuses) <= {200, 429, 503}
        assert statuses.count(200) > count
        # Level after the start: what is held at the end is what was held before.
        third = len(memory) // 3
        assert max(memory[-third:]) < 1.15 * max(memory[: 2 * third]) + 20_000  # kB
        service.wait_until(lambda: len(list(files.iterdir())) <= descriptors + 3)
        assert service.status("Threads") <= threads + 8  # the pools fill once
        assert service.metric("numpyesm_queue_length") == service.metric("numpyesm_result_bytes") == 0
        assert service.metric("numpyesm_passes_total") < statuses.count(200)  # small requests share passes


@posix
@pytest.mark.slow
def test_requests_that_would_take_too_much_memory_are_refused(weights: list[str]) -> None:
    """Here the limit is the system's, on the address space, which kills."""
    size = 512 << 20
    with serving(*weights, before=["prlimit", f"--as={size}"]) as service:
        document = check_error(service.post(ENCODE, {"params": EVERYTHING, "items": items(*["A" * 2048] * 8)}), 413)
        assert document["code"] == "user.memory"
        assert "GiB" in document["detail"]
        for length in (512, 100):
            body = {"params": EVERYTHING, "items": items("A" * length)}
            assert service.post(ENCODE, body).status_code == 200
        assert service.status("VmHWM") < size >> 10


@pytest.mark.slow
def test_largest_request(tmp_path: Path) -> None:
    """Eight items of 2048, every layer, every output: answered, within the memory that was promised."""
    file = tmp_path / "few-heads.safetensors"
    save_canonical(file, replace(random_checkpoint(ModelConfig(3, 80, 4, 160), 1), synthetic=False))
    sequences = [random_sequence(2048, i) for i in range(8)]
    body = {"params": EVERYTHING, "items": items(*sequences)}
    with serving("--model", f"esm2-35m={file}", "--backend", "numpy", "--max-memory", "600M") as service:
        idle = service.status("VmRSS")
        url = f"{service.url}/api/v3/esm2-35m/encode"
        with requests.post(url, json=body, stream=True, timeout=400) as response:
            assert response.status_code == 200
            assert sum(map(len, response.iter_content(1 << 20))) > 10**8
        # A second time: freed memory serves again, nothing piles up.
        npz = requests.post(url, json=body, headers={"Accept": "application/x-npz"}, timeout=400)
        assert service.status("VmHWM") < 600 * 1024
        assert service.status("VmHWM") > idle + 100 * 1024  # the maps of eight items at least were there
    expected = ESM2.from_pretrained(file, backend="numpy").encode([sequences[7]], **EVERYTHING)[0]
    with np.load(io.BytesIO(npz.content)) as arrays:
        np.testing.assert_allclose(arrays["contacts_7"], expected.contacts, atol=1e-5)
        np.testing.assert_allclose(arrays["attentions_7"], expected.attentions, atol=1e-5)
        assert arrays["per_token_0_3"].shape == (2048, 80)


SDK_VERSION = "0.4.0"
SDK_SCRIPT = """
import json, sys
from biolmai import BioLM
from biolmai.client import BioLMApi

asked = json.load(sys.stdin)
key, eight = asked["key"], asked["items"][:8]
ours = BioLMApi("esm2-35m", api_key=key)
print(json.dumps({
    "encode": ours.encode(items=asked["items"], params={"include": ["mean", "contacts"], "repr_layers": [-1, 1]}),
    "predict": ours.predict(items=asked["masked"], params={"positions": "masked"}),
    "log_prob": ours.call("log_prob", eight),
    "one_bad": ours.encode(items=asked["one_bad"]),
    "wrong_key": BioLMApi("esm2-35m", api_key="no").encode(items=eight[:2]),
    "one_off": BioLM(entity="esm2-35m", action="encode", type="sequence", items="MSILV", api_key=key),
}))
"""


def sdk() -> Path:
    """The programs of an environment that has the SDK: it would pull other versions into ours."""
    folder = Path(__file__).parents[1] / ".venv-biolmai-{}-py{}{}".format(SDK_VERSION, *sys.version_info)
    programs = folder / "bin"
    if not (programs / "biolmai").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([programs / "python", "-m", "pip", "install", "--quiet", f"biolmai=={SDK_VERSION}"], check=True)
    return programs


@pytest.mark.slow
@pytest.mark.network
def test_sdk(loaded: ESM2, tmp_path: Path) -> None:
    """The `biolmai` SDK, pointed here."""
    programs, key = sdk(), "a-key-of-ours"
    sequences = [random_sequence(5 + 3 * i, i) for i in range(40)]
    masked = [sequence[:2] + "<mask>" + sequence[2:] for sequence in sequences[:20]]
    one_bad = items(*sequences[:13], "MK1T", *sequences[14:])
    asked = {"key": key, "items": items(*sequences), "masked": items(*masked), "one_bad": one_bad}
    with ServiceHere({"esm2-35m": loaded}, [key]) as service:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "BIOLMAI_THREADS": "1",  # its default of 16 does not import on machines of less than four CPUs
            "BIOLMAI_BASE_API_URL": f"{service.url}/api/v3",
            "BIOLMAI_BASE_DOMAIN": service.url,
            "BIOLMAI_TOKEN": key,
        }

        def run(program: str, *arguments: str) -> str:
            command, text = [str(programs / program), *arguments], json.dumps(asked)
            done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=tmp_path, env=environment)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout

        got = json.loads(run("python", "-c", SDK_SCRIPT))
        for command in (["list"], ["show", "esm2-35m", "--include-schemas"]):
            run("biolmai", "model", *command, "--format", "json", "-o", f"{command[0]}.json")
    listed, shown = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("list", "show"))
    actions = ["encode", "predict", "log_prob"]
    assert [(model["model_slug"], model["actions"]) for model in [*listed, shown]] == [("esm2-35m", actions)] * 2
    assert list(shown["schemas"]) == actions

    encoded = [result.to_dict() for result in loaded.encode(sequences, [-1, 1], ["mean", "contacts"])]
    # The SDK sends batches of eight: an index is that in the batch.
    assert [result["sequence_index"] for result in got["encode"]] == [i % 8 for i in range(40)]
    same([result | {"sequence_index": i} for i, result in enumerate(got["encode"])], encoded)
    same(got["predict"], [result.to_dict() for result in loaded.predict(masked, "masked")])
    same(got["log_prob"], [{"log_prob": score} for score in loaded.log_prob(sequences[:8]).tolist()])
    assert got["one_off"]["sequence_index"] == 0

    bad = got["one_bad"].pop(13)
    assert bad["status_code"] == 422
    assert "'1' at position 3" in bad["error"]["items__0__sequence"][0]
    assert all("embeddings" in result for result in got["one_bad"])
    assert [result["status_code"] for result in got["wrong_key"]] == [401, 401]
