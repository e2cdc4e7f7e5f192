"""The Ray engine on a cluster of this machine: the local engine's output, also if a worker is killed on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, small_model, write_fasta

from numpyesm import ESM2, InvalidOption
from numpyesm.bulk import Progress, embed_fasta
from numpyesm.bulk.ray_engine import check_ray, pool_size
from numpyesm.errors import BulkError
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import StoredTensor

pytest.importorskip("ray")
pytest.importorskip("pyarrow")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.filterwarnings("ignore::numpyesm.SyntheticWeightsWarning"),
    pytest.mark.timeout(400),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that is there already; more CPUs than the machine may have: two actors whatever it is."""
    ray = check_ray(None, None)
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def below(ancestor: int) -> dict[int, str]:
    """All processes below one, and what they are called."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == ancestor:
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text()
                found |= below(int(stat.parent.name))
    return found


class Killing(Progress):
    """Kills one of two workers once there is a result."""

    killed = 0

    def advance(self, step: Any) -> None:
        super().advance(step)
        while not self.killed:
            pool = [pid for pid, name in below(os.getpid()).items() if "ray::_Worker" in name]
            if len(pool) == 2:  # both have started
                self.killed = pool[0]
                os.kill(self.killed, signal.SIGKILL)


@pytest.mark.usefixtures("cluster")
def test_two_workers_of_which_one_is_killed(tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "in.fasta", 90, duplicates=20)
    source.write_text(source.read_text() + ">bad\nMKJ\n")
    model, progress = small_model(backend="numpy", threads=1), Killing()
    ray: dict[str, Any] = {"engine": "ray", "workers": 2, "threads": 1, "progress": progress}
    for engine, options in (("ray", ray), ("local", {})):
        # One name in two folders: a table's metadata name its list of rejected records.
        done = embed_fasta(source, tmp_path / engine / "out.parquet", model, tokens_per_batch=300, **options)
        assert (done.computed, done.sequences, done.rejected) == (90, 90, 1)
        assert {path.name for path in (tmp_path / engine).iterdir()} == {"out.parquet", "out.rejected.tsv"}
    assert progress.killed
    for name in ("out.parquet", "out.rejected.tsv"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@pytest.mark.usefixtures("cluster")
def test_an_error_in_a_worker_is_the_run_s_error(tmp_path: Path) -> None:
    """The message of the local engine, although it happens in another process."""
    checkpoint = random_checkpoint(SMALL, seed=1)
    tensors = dict(checkpoint.tensors)
    tensors["final_norm.bias"] = StoredTensor(tensors["final_norm.bias"].raw + np.float32(1e6))
    model = ESM2(dataclasses.replace(checkpoint, tensors=tensors), backend="numpy", threads=1)
    source = write_fasta(tmp_path / "in.fasta", 10)
    for engine in ("local", "ray"):
        with pytest.raises(BulkError, match=r"^mean_3 has 1e\+06, beyond float16: use dtype fp32$"):
            embed_fasta(source, tmp_path / "o.parquet", model, dtype="fp16", engine=engine)


def test_interrupted_on_ray_and_finished_here(tmp_path: Path) -> None:
    """Both engines resume from the same journal; Ctrl-C leaves no process behind; Ray's own talk is not heard."""
    source = write_fasta(tmp_path / "in.fasta", 60, longest=300, seed=3)
    weights, out = "synthetic:esm2-8m", tmp_path / "out.parquet"
    options = f"--weights {weights} --backend numpy --threads 1 --tokens-per-batch 600 --engine ray --workers 1"
    command = [sys.executable, "-m", "numpyesm", "embed", source, "-o", out, *options.split(), "--json-progress"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    for line in process.stderr:  # a line of Ray's is no JSON
        if json.loads(line).get("records", 0) > 8:
            break
    started = below(process.pid)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout) == (130, b"")
    assert [json.loads(line)["event"] for line in stderr.splitlines()][-1] == "error"
    deadline = time.monotonic() + 30
    while (left := [pid for pid in started if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left
    model = ESM2.from_pretrained(weights, backend="numpy", threads=1)
    assert 0 < embed_fasta(source, out, model, tokens_per_batch=600).computed < 60
    embed_fasta(source, tmp_path / "fresh.parquet", model, tokens_per_batch=600)
    assert out.read_bytes() == (tmp_path / "fresh.parquet").read_bytes()


def test_no_such_cluster(model: ESM2, tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "in.fasta", 2)
    with pytest.raises(BulkError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        embed_fasta(source, tmp_path / "o.parquet", model, engine="ray", address="127.0.0.1:1")


def test_a_pool_that_fits_the_nodes() -> None:
    """What does not fit is refused: Ray would wait for it for ever."""
    for nodes, workers, threads, pool in (
        ([2], None, None, (1, 2)),
        ([2], 2, None, (2, 1)),
        ([0, 64, 64], None, None, (32, 4)),
        ([0, 64, 64], 4, None, (4, 32)),
        ([8, 3], None, None, (3, 3)),
        ([8, 8], None, 8, (2, 8)),
        ([4, 4, 4], 1, None, (1, 4)),
    ):
        assert pool_size(nodes, workers, threads) == pool
    for workers, threads in ((3, 8), (None, 16)):
        with pytest.raises(InvalidOption, match="room for"):
            pool_size([8, 8], workers, threads)
