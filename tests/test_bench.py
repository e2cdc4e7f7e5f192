"""The benchmark's machinery on a tiny run: what it writes, and that it notices an engine that computes something else.

No time is asserted anywhere.
"""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("esm")

# `bench` belongs to the repository, not to the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import agreement, peaks, readme, report, workloads
from bench.__main__ import main as command
from bench.client import child_environment
from bench.engines import Environments, select
from bench.machine import machine_info
from bench.measure import Limits, Rounds
from bench.run import Plan, run
from bench.weights import make_weights

ENGINES = ["numpyesm-numpy", "fair-esm"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench-cache")


def environments() -> Environments:
    """Both engines in the interpreter that runs the tests."""
    here = Path(sys.executable)
    return Environments(here, here, here)


def tiny_plan(cache: Path, **changes: object) -> Plan:
    options: dict[str, object] = {
        "mode": "quick",
        "engines": select(ENGINES),
        "names": ("1x20", "2x16"),
        "threads": 1,
        "limits": Limits(repeats=1, cell_seconds=5, warm_up_seconds=5, skip_seconds=60),
        "contact_lengths": (24,),
        "cold_repeats": 1,
        "import_repeats": 1,
        "peaks": False,
        "model": "esm2-8m",
        "cache": cache,
    }
    return Plan(**(options | changes))  # type: ignore[arg-type]


def test_a_run_writes_json_table_and_every_sample(cache: Path, tmp_path: Path) -> None:
    result = run(tiny_plan(cache), environments())

    path = report.write_all(result, tmp_path)
    loaded = json.loads((tmp_path / "latest.json").read_text())
    assert {engine["status"] for engine in loaded["engines"].values()} == {"ok"}, loaded["engines"]
    assert loaded["engines"]["numpyesm-numpy-fp32"]["agreement"]["max_difference"] < 1e-4
    lanes = {"numpyesm-numpy-fp32", "numpyesm-numpy-fp32:mean", "fair-esm-fp32"}
    assert set(loaded["timings"]) == lanes
    for lane in lanes:
        for name in ("1x20", "2x16"):
            cell = loaded["timings"][lane][name]
            assert len(cell["seconds"]) == 1, (lane, name, cell)
            assert cell["median"] == cell["best"] == cell["seconds"][0] > 0
            assert cell["peak_mb"] > 0
    for name, cells in loaded["contacts"].items():
        assert cells["24"]["agreement"]["agrees"], (name, cells)
        assert cells["24"]["median_peak_mb"] > 0
    assert set(loaded["cold_start"]) == {"numpyesm-numpy-fp32", "fair-esm-fp32"}
    assert all(len(cell["seconds"]) == 1 for cell in loaded["cold_start"].values()), loaded["cold_start"]
    assert math.isfinite(loaded["import"]["extra_seconds"])

    text = path.read_text()
    for expected in ("**Seconds**", "fair-esm-fp32", "**numpyesm-numpy-fp32**", "Contact map", "Cold start"):
        assert expected in text
    # The report alone can be made again.
    assert report.main([str(tmp_path / "latest.json"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "latest.md").read_text() == text


def test_an_engine_that_disagrees_is_named_and_not_timed(cache: Path) -> None:
    plan = tiny_plan(
        cache, sabotage="numpyesm-numpy-fp32", names=("1x20",), contact_repeats=0, cold_repeats=0, import_repeats=0
    )
    result = run(plan, environments())

    assert result["engines"]["numpyesm-numpy-fp32"]["status"] == "disagrees"
    assert "allowed is 0.001" in result["engines"]["numpyesm-numpy-fp32"]["reason"]
    assert result["engines"]["fair-esm-fp32"]["status"] == "ok"
    assert list(result["timings"]) == ["fair-esm-fp32"]
    assert "numpyesm-numpy-fp32 disagrees" in report.markdown(result)


def test_an_engine_that_cannot_run_is_named_with_the_reason(cache: Path, tmp_path: Path) -> None:
    empty = tmp_path / "python-without-peers"
    # A Python that sees no installed packages stands for a peers' environment where nothing could be installed.
    empty.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    empty.chmod(0o755)
    here = Path(sys.executable)
    plan = tiny_plan(cache, names=("1x20",), contact_repeats=0, cold_repeats=0, import_repeats=0)
    result = run(plan, Environments(here, empty, here))

    assert result["engines"]["fair-esm-fp32"]["status"] == "missing"
    assert result["engines"]["numpyesm-numpy-fp32"]["status"] == "ok"
    assert "- fair-esm-fp32 missing: " in report.markdown(result)


def test_peers_get_the_same_numbers(cache: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.numpy import load_file

    from numpyesm.weights import load_canonical

    folder, problems = make_weights("esm2-8m", 0, select(ENGINES), environments(), cache)
    assert not problems
    canonical = load_canonical(folder / "canonical.safetensors")
    key = canonical.array("layers.1.qkv.weight")[:, 320:640].T
    state = torch.load(folder / "fair-esm.pt", weights_only=True)["model"]
    np.testing.assert_array_equal(state["layers.1.self_attn.k_proj.weight"].numpy(), key)
    hugging_face = load_file(folder / "hf" / "model.safetensors")
    np.testing.assert_array_equal(hugging_face["esm.encoder.layer.1.attention.self.key.weight"], key)


@pytest.mark.parametrize(
    ("precision", "noise", "agrees"),
    [("fp32", 1e-5, True), ("fp32", 2e-2, False), ("bf16", 1e-2, True), ("bf16", 1.0, False), ("bf16", 0.0, False)],
)
def test_comparison(precision: str, noise: float, agrees: bool) -> None:
    stream = np.random.default_rng(0)
    reference = [{"mean": stream.standard_normal(8), "logits": stream.standard_normal((5, 20))}]
    near = [{key: value + noise * stream.standard_normal(value.shape) for key, value in reference[0].items()}]
    assert agreement.compare(near, reference, precision)["agrees"] is agrees


@pytest.mark.parametrize("broken", [np.full((5, 20), np.nan), np.zeros((4, 20))])
def test_comparison_refuses_what_is_not_finite_or_of_another_shape(broken: np.ndarray) -> None:
    reference = [{"mean": np.ones(8), "logits": np.ones((5, 20))}]
    verdict = agreement.compare([{"mean": np.ones(8), "logits": broken}], reference, "int8")
    assert verdict["agrees"] is False
    assert "logits" in verdict["reason"]


def test_workloads() -> None:
    config = {"embed_dim": 480, "num_layers": 12, "ffn_dim": 1920}
    batch = workloads.sequences("varlen256")
    assert len(batch) == 256
    assert min(map(len, batch)) == 87
    batches = workloads.padded_batches(batch)
    assert sorted(index for indices in batches for index in indices) == list(range(256))
    assert all((max(len(batch[i]) for i in b) + 2) * len(b) <= workloads.MAX_BATCH_TOKENS for b in batches)
    # PERFORMANCE.md: 66.9 MFLOP a token, and 23,040 for each token and token of its sequence.
    assert workloads.flops(["A" * 98], config) == pytest.approx(100 * (66.9e6 + 23040 * 100), rel=1e-3)


class FakeWorker:
    """A worker that says how long it took, and keeps a log of who ran what."""

    def __init__(self, name: str, seconds: float, log: list[tuple[str, str]]) -> None:
        self.name, self.seconds, self.log = name, seconds, log

    def ask(self, **request: str) -> dict[str, float]:
        if request["do"] == "run":
            self.log.append((self.name, request["name"]))
        return {"seconds": self.seconds * (10 if request["name"] == "80x16" else 1), "peak_mb": 1.0}

    def cpu_seconds(self) -> float:
        return 0.0


def test_rounds_take_turns_and_name_what_they_leave_out() -> None:
    log: list[tuple[str, str]] = []
    workers = {name: FakeWorker(name, seconds, log) for name, seconds in (("a", 3.0), ("b", 4.0), ("slow", 5.0))}
    batches = {name: workloads.sequences(name) for name in ("8x16", "80x16")}
    limits = Limits(repeats=3, cell_seconds=35, warm_up_seconds=2, skip_seconds=45)
    cells = Rounds(workers, batches, limits, always=frozenset("b")).run()  # type: ignore[arg-type]

    assert "left out: would take about 50 s" in cells["slow"]["80x16"]["note"]
    assert cells["b"]["80x16"]["seconds"] == [40.0]  # over the budget of a cell after one run
    assert cells["a"]["80x16"]["seconds"] == [30.0, 30.0]
    assert [name for name, workload in log if workload == "8x16"][:3] == ["a", "b", "slow"]
    assert all(len(cells[name]["8x16"]["seconds"]) == 3 for name in workers), cells
    # In turn: nobody runs the same workload twice in a row.
    assert all(one != two for one, two in itertools.pairwise(log))


def test_every_turn_of_a_short_run_is_warmed_up() -> None:
    log: list[tuple[str, str]] = []
    workers = {name: FakeWorker(name, seconds, log) for name, seconds in (("short", 0.1), ("long", 0.6))}
    limits = Limits(repeats=3, cell_seconds=35, warm_up_seconds=0.3, skip_seconds=45)
    cells = Rounds(workers, {"8x16": ["M"]}, limits).run()  # type: ignore[arg-type]
    assert [cells[name]["8x16"]["seconds"] for name in workers] == [[0.1] * 3, [0.6] * 3]
    assert [sum(name == who for who, _ in log) for name in workers] == [6, 3]


def test_cold_start_table_leaves_out_the_first_sample_and_names_what_is_missing() -> None:
    from bench.cold import table, without_first

    cell = without_first({"seconds": [9.0, 0.3, 0.5, 0.4], "peak_mb": [50.0, 100.0, 100.0, 100.0]})
    assert (cell["median"], cell["best"], cell["peak_mb"]) == (0.4, 0.3, 100.0)
    report = {
        "starts": {"ours": cell, "theirs": without_first({"missing": "no torch"})},
        "sizes": {"ours": {"numpy": 57_400_000, "numpyesm": 600_000}, "theirs": {"torch": None}},
    }
    text = table(report)
    assert "| ours | 0.400 | 0.300 | 100 |" in text
    assert "no torch" in text
    assert "| ours | 58.0 | numpy 57.4, numpyesm 0.6 |" in text
    assert "not installed here: torch" in text


def test_install_sizes_follow_dependencies() -> None:
    from bench.cold import install_size
    from bench.engines import Environments

    sizes = install_size(("numpy", "safetensors"), "own", Environments.find())
    assert sizes["numpy"] is not None
    assert sizes["numpy"] > 10_000_000
    assert 100_000 < (sizes["numpyesm"] or 0) < 5_000_000
    assert "torch" not in sizes


_PEAK_CHECK = """
import sys, threading
from bench import peaks
import llvmlite.binding as llvm
precision, hidden = sys.argv[1], set(sys.argv[2].split(","))
features = {name for name in peaks.host_features() if name.split("-")[0] not in hidden}
chosen = peaks.instruction(precision, features)
if chosen is None:
    print("none")
    sys.exit()
loop, alive = peaks.compiled_loop(precision, chosen)
found = []
threads = [threading.Thread(target=lambda: found.append(loop(1000))) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
products = sum(int(sums.sum(dtype="float64")) for sums in found)
assert products == 3 * 1000 * chosen.operations // 2, (chosen, products)
assert all((sums == sums[0]).all() for sums in found)
print(chosen.name)
"""


@pytest.mark.parametrize("hidden", ["-", "amx"])
@pytest.mark.parametrize("precision", peaks.PRECISIONS)
def test_a_peak_counts_the_products_that_its_loop_computes(precision: str, hidden: str) -> None:
    """On the best instructions and, where those are tiles, on the vectors below; in several threads."""
    pytest.importorskip("llvmlite")
    run = subprocess.run(
        [sys.executable, "-c", _PEAK_CHECK, precision, hidden],
        cwd=peaks.ROOT,
        env=child_environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    method = run.stdout.strip()
    flags = set(machine_info()["isa"])
    if precision != "fp32" and f"amx_{precision}" in flags and hidden == "-" and peaks.tiles_granted():
        # What the CPU has and the system grants is what counts as its peak.
        assert method == {"bf16": "llvm.x86.tdpbf16ps", "int8": "llvm.x86.tdpbusd"}[precision]
    elif {"avx512f", "avx512_bf16", "avx512_vnni"} <= flags:
        assert method.endswith(("512", "v16f32"))


def test_tiles_are_not_used_where_the_system_refuses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    llvm = pytest.importorskip("llvmlite.binding")
    has = {
        "avx512f": True,
        "avx512bf16": True,
        "avx512vnni": True,
        "amx-tile": True,
        "amx-bf16": True,
        "amx-int8": True,
    }
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: has)
    names = {}
    for granted in (True, False):
        monkeypatch.setattr(peaks, "tiles_granted", lambda granted=granted: granted)
        features = peaks.host_features()
        names[granted] = [getattr(peaks.instruction(p, features), "name", "") for p in peaks.PRECISIONS]
    assert names[True] == ["llvm.fma.v16f32", "llvm.x86.tdpbf16ps", "llvm.x86.tdpbusd"]
    assert names[False][1:] == ["llvm.x86.avx512bf16.dpbf16ps.512", "llvm.x86.avx512.vpdpbusd.512"]


def test_readme_is_written_from_a_run_that_lacks_something_and_says_so() -> None:
    result = json.loads((Path(__file__).resolve().parents[1] / "bench" / "results" / "latest.json").read_text())
    result["peaks"]["bf16"] = {"missing": "this CPU has no bf16 multiply-add"}
    result["engines"]["esm-cpp-int8"] = {"family": "esm-cpp", "status": "missing", "reason": "no wheel"}
    result["timings"].pop("esm-cpp-int8", None)
    del result["cold_start"]
    text = readme.section(result)
    assert "bf16" not in text.split("whose own peak is ")[1].split(" billion")[0]
    assert "Not measured, for reasons that the full table names: esm-cpp-int8." in text
    assert "esm-cpp-int8 missing: no wheel" in report.markdown(result)
    del result["peaks"]
    assert "whose own peak" not in readme.section(result)


def test_a_best_peer_is_not_claimed_where_another_was_left_out() -> None:
    result = json.loads((Path(__file__).resolve().parents[1] / "bench" / "results" / "latest.json").read_text())
    # Every engine is measured there, in quick runs too.
    result["workloads"] = {"8x256": result["workloads"]["8x256"]}
    fastest = report.best_peer(result, "fp32", "8x256")
    assert fastest is not None
    assert f"without {fastest[0]}" not in report.markdown(result)
    for measured in ("median", "best"):
        del result["timings"][fastest[0]]["8x256"][measured]
    result["timings"][fastest[0]]["8x256"] |= {"seconds": [], "note": "left out: would take about 25 s a run"}
    second = report.best_peer(result, "fp32", "8x256")
    assert second is not None
    assert f"({second[0]}, without {fastest[0]}" in report.markdown(result)
    ratio = second[1] / result["timings"]["numpyesm-numba-fp32"]["8x256"]["median"]
    assert f"{ratio:.2f}* |" in readme.section(result)
    assert "left out there" in readme.section(result)


def test_report_shows_the_peak_memory_of_every_engine() -> None:
    result = json.loads((Path(__file__).resolve().parents[1] / "bench" / "results" / "latest.json").read_text())
    table = report.markdown(result).split("**Seconds**")[1].split("**Times")[0]
    for name in report.ready(result):
        peak = max(cell["peak_mb"] for cell in result["timings"][name].values())
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {report.bold(name)} |"))
        assert row.endswith(f" {peak:,.0f} |")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers-python", "/nowhere/python"], "/nowhere/python: there is no interpreter"),
        (["--model", "esm2-3b"], "esm2-8m, esm2-35m"),
        (["--output", "{file}/below"], "file"),
        (["--workloads", "1x2049"], "L from 1 to 2048"),
        (["--engines", "esm3"], "engine 'esm3' is unknown"),
    ],
)
def test_wrong_use_is_said_before_anything_is_measured(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("bench.__main__.run", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit) as ended:
        command([word.format(file=tmp_path / "file") for word in arguments])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_report_names_the_instruction_of_each_peak() -> None:
    result = json.loads((Path(__file__).resolve().parents[1] / "bench" / "results" / "latest.json").read_text())
    result["peaks"]["bf16"] = {"method": "llvm.x86.tdpbf16ps", "gops": {"2": 4000.0}}
    result["peaks"]["int8"] = {"missing": "this CPU has no int8 multiply-add"}
    assert ", bf16 llvm.x86.tdpbf16ps." in report.markdown(result)


def test_readme_shows_the_latest_run() -> None:
    root = Path(__file__).resolve().parents[1]
    text = (root / "README.md").read_text()
    result = json.loads((root / "bench" / "results" / "latest.json").read_text())
    assert readme.updated(text, result) == text, "run `python -m bench.readme`"
    assert report.markdown(result) == (root / "bench" / "results" / "latest.md").read_text()
