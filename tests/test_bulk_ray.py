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
from pathlib import Path

import numpy as np
import pytest
from bulk_runs import command, embed, environment, events, small_weights, write_fasta
from conftest import SMALL

from numpyesm import InvalidOption
from numpyesm.bulk.ray_engine import pool_size
from numpyesm.weights.canonical import save_canonical
from numpyesm.weights.synthetic import random_checkpoint
from numpyesm.weights.tensor import StoredTensor

pytest.importorskip("ray")
pytest.importorskip("pyarrow")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.timeout(400),
]


def actors(ancestor: int) -> list[int]:
    """Processes of the pool below a process."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_text()
    found = []
    for process, name in names.items():
        up: int | None = process
        while up is not None and up != ancestor:
            up = parents.get(up)
        if up == ancestor and "ray::_Worker" in name:
            found.append(process)
    return found


def test_two_workers_of_which_one_is_killed(tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "in.fasta", 90, longest=500, duplicates=20)
    source.write_text(source.read_text() + ">bad\nMKJ\n")
    common = ("--weights", "synthetic:esm2-8m", "--backend", "numpy", "--tokens-per-batch", "600", "--json-progress",
              "--threads", "1")  # fmt: skip
    # One name in two folders: a table's metadata name its list of rejected records.
    (tmp_path / "ray").mkdir()
    (tmp_path / "local").mkdir()
    # More CPUs than the machine may have: two actors whatever it is.
    process = subprocess.Popen(
        command(source, "-o", tmp_path / "ray/out.parquet", *common, "--engine", "ray", "--workers", "2"),
        env=environment(NUMPYESM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    assert process.stdout is not None
    lines, killed = [], 0
    for line in process.stderr:
        lines.append(line)
        event = json.loads(line)  # every line, whatever Ray has to say
        if event["event"] == "progress" and event["records"] > 0 and not killed:
            pool = actors(process.pid)
            assert len(pool) == 2
            killed = pool[0]
            os.kill(killed, signal.SIGKILL)
    assert process.wait(timeout=60) == 1  # one record was rejected
    assert process.stdout.read() == b""  # Ray has much to say about a killed worker
    found = [json.loads(line) for line in lines]
    assert killed
    assert found[-1]["event"] == "done"
    assert found[-1]["computed"] == found[-1]["sequences"] == 90

    local = embed(source, "-o", tmp_path / "local/out.parquet", *common)
    assert local.returncode == 1
    for name in ("out.parquet", "out.rejected.tsv"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    for engine in ("ray", "local"):
        assert {path.name for path in (tmp_path / engine).iterdir()} == {"out.parquet", "out.rejected.tsv"}


def test_interrupted_on_ray_and_finished_here(tmp_path: Path) -> None:
    """Both engines go on from the same journal; Ctrl-C leaves no process of the cluster behind."""
    source = write_fasta(tmp_path / "in.fasta", 90, longest=500, seed=3)
    common = ("--weights", "synthetic:esm2-8m", "--backend", "numpy", "--tokens-per-batch", "600", "--json-progress",
              "--threads", "1")  # fmt: skip
    out = tmp_path / "out.parquet"
    process = subprocess.Popen(
        command(source, "-o", out, *common, "--engine", "ray"), env=environment(NUMPYESM_THREADS="1"),
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(b"{") and json.loads(line).get("records", 0) > 8:
            break
    below = actors(process.pid)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in below) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    done = embed(source, "-o", out, *common)
    assert done.returncode == 0, done.stderr.decode()
    assert 0 < events(done.stderr)[-1]["computed"] < 90
    fresh = embed(source, "-o", tmp_path / "fresh.parquet", *common)
    assert fresh.returncode == 0
    assert out.read_bytes() == (tmp_path / "fresh.parquet").read_bytes()


def test_an_error_in_a_worker_is_the_run_s_error(tmp_path: Path) -> None:
    """The message of the local engine, although it happens in another process."""
    checkpoint = random_checkpoint(SMALL, seed=1)
    tensors = dict(checkpoint.tensors)
    tensors["final_norm.bias"] = StoredTensor(tensors["final_norm.bias"].raw + np.float32(1e6))
    weights = tmp_path / "large.safetensors"
    save_canonical(weights, dataclasses.replace(checkpoint, tensors=tensors))
    source = write_fasta(tmp_path / "in.fasta", 10)
    common = (source, "--weights", weights, "--backend", "numpy", "--dtype", "fp16", "--json-progress")
    for more in ([], ["--engine", "ray"]):
        done = embed(*common, "-o", tmp_path / "o.parquet", *more, NUMPYESM_THREADS="1")
        assert done.returncode == 1
        assert events(done.stderr)[-1] == {
            "event": "error",
            "message": "mean_3 has 1e+06, beyond float16: use dtype fp32",
        }
    # What was asked for does not fit; with fp32 it is another run.
    assert embed(*common, "-o", tmp_path / "o.parquet", "--dtype", "fp32", "--restart").returncode == 0


def test_no_such_cluster(tmp_path: Path) -> None:
    source = write_fasta(tmp_path / "in.fasta", 2)
    weights = small_weights(tmp_path)
    done = embed(
        *(source, "-o", tmp_path / "o.parquet", "--weights", weights, "--engine", "ray", "--address", "127.0.0.1:1")
    )
    assert done.returncode == 1
    assert b"no Ray cluster at 127.0.0.1:1" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "pool"),
    [
        ([2], None, None, (1, 2)),
        ([2], 2, None, (2, 1)),
        ([2], 1, None, (1, 2)),
        ([0, 64, 64], None, None, (32, 4)),
        ([0, 64, 64], 4, None, (4, 32)),
        ([8, 3], None, None, (3, 3)),
        ([8, 8], None, 8, (2, 8)),
        ([8, 8], 3, 8, None),
        ([8, 8], None, 16, None),
        ([4, 4, 4], 1, None, (1, 4)),
    ],
)
def test_a_pool_that_fits_the_nodes(
    nodes: list[int], workers: int | None, threads: int | None, pool: tuple[int, int] | None
) -> None:
    """What does not fit is refused: Ray would wait for it for ever."""
    if pool is None:
        with pytest.raises(InvalidOption, match="room for"):
            pool_size(nodes, workers, threads)
    else:
        assert pool_size(nodes, workers, threads) == pool
