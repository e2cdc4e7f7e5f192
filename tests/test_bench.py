"""The benchmark notices engines that compute something else, and counts what its loops compute."""

from __future__ import annotations

import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

# `bench` belongs to the repository, not to the installed package.
sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import accuracy, measure, peaks, workloads


@pytest.mark.slow
@pytest.mark.trained_weights
def test_a_run_names_what_is_missing_and_what_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from bench import report, run
    from bench.engines import select

    plan = run.Plan(
        mode="quick",
        engines=select(["numpyesm-numpy-fp32", "fair-esm", "esm-cpp-int8"]),
        names=("1x20", "2x16"),
        threads=1,
        limits=measure.Limits(repeats=1, cell_seconds=5, warm_up_seconds=5, skip_seconds=60),
        parts=("timings", "growth", "contacts", "scan", "accuracy"),
        growth=("1x18",),
        model="esm2-8m/2",
        contact_lengths=(24,),
        scan_residues=20,
        cache=tmp_path / "cache",
    )
    short = [">" + record for record in accuracy.REAL_PROTEINS.read_text().split(">")[1:] if len(record) < 100]
    (tmp_path / "short.fasta").write_text("".join(short))
    monkeypatch.setattr(accuracy, "REAL_PROTEINS", tmp_path / "short.fasta")
    here = dict.fromkeys(("own", "peers", "esm-cpp"), Path(sys.executable))
    report.write_all(run.run(plan, here), tmp_path)
    result = json.loads((tmp_path / "latest.json").read_text())

    status = {name: engine["status"] for name, engine in result["engines"].items()}
    assert status == {"numpyesm-numpy-fp32": "ok", "fair-esm-fp32": "ok", "esm-cpp-int8": "missing"}
    assert result["engines"]["numpyesm-numpy-fp32"]["agreement"]["max_difference"] < 1e-4
    assert result["accuracy"]["numpyesm-numpy-fp32"]["residue_min"] > 0.999999
    assert set(result["timings"]) == {"numpyesm-numpy-fp32", "numpyesm-numpy-fp32:mean", "fair-esm-fp32"}
    assert result["growth"]["1"]["numpyesm-numpy-fp32"]["1x18"]["best"] > 0
    for task in ("contacts of 24", "scan of 20"):
        assert result["processes"][task]["numpyesm-numpy-fp32"]["max_difference"] < 1e-3
    page = (tmp_path / "latest.md").read_text()
    assert page == report.markdown(result)
    assert "| **numpyesm-numpy-fp32** |" in page
    assert "- esm-cpp-int8 missing: " in page


@pytest.mark.parametrize(
    ("precision", "noise", "agrees"),
    [("fp32", 1e-5, True), ("fp32", 2e-2, False), ("bf16", 1e-2, True), ("bf16", 1.0, False), ("bf16", 0.0, False)],
)
def test_comparison(precision: str, noise: float, agrees: bool) -> None:
    stream = np.random.default_rng(0)
    reference = {"mean": stream.standard_normal(8), "logits": stream.standard_normal((5, 20))}
    near = {key: value + noise * stream.standard_normal(value.shape) for key, value in reference.items()}
    assert accuracy.compare([near], [reference], precision)["agrees"] is agrees
    for broken in (np.full((5, 20), np.nan), np.zeros((4, 20))):
        verdict = accuracy.compare([near | {"logits": broken}], [reference], precision)
        assert (verdict["agrees"], "logits" in verdict["reason"]) == (False, True)


def test_workloads() -> None:
    chains = workloads.sequences("varlen64")
    assert len(set(chains)) == 64
    assert set(chains) < set(workloads.sequences("varlen256"))
    assert [len(sequence) for sequence in workloads.sequences("2x2048")] == [2046] * 2
    for name, said in (("varlen257", "there are 256"), ("varlen0", "expected"), ("8x0", "expected")):
        with pytest.raises(ValueError, match=said):
            workloads.sequences(name)


def test_accuracy_is_of_the_worst_residue() -> None:
    truth = np.random.default_rng(0).standard_normal((200, 16))
    rows = truth.copy()
    rows[7] = -rows[7]
    figures = accuracy.summary([rows, truth], [truth, truth])
    assert figures["residue_min"] == pytest.approx(-1)
    assert figures["residue_1st_percentile"] == pytest.approx(1)
    assert figures["mean_min"] < 1


def test_rounds_take_turns_and_name_what_they_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of workers that say how long they took, and keep a log of who ran what."""
    monkeypatch.setattr(measure, "SETTLE_SECONDS", 0)
    log: list[tuple[str, str]] = []

    def worker(engine: str, seconds: float) -> Any:
        def ask(do: str, name: str, **_: Any) -> dict[str, float]:
            log.extend([(engine, name)] * (do == "run"))
            return {"seconds": seconds * (10 if name == "80x16" else 1), "peak_mb": 1.0}

        return SimpleNamespace(ask=ask, cpu_seconds=lambda: 0.0)

    workers = {name: worker(name, seconds) for name, seconds in (("a", 3), ("ours", 4), ("slow", 5), ("short", 0.1))}
    batches = {name: workloads.sequences(name) for name in ("8x16", "80x16")}
    limits = measure.Limits(repeats=3, cell_seconds=35, warm_up_seconds=2, skip_seconds=45)
    cells = measure.Rounds(workers, batches, limits, {"ours"}).run()
    assert "left out: would take about 50 s" in cells["slow"]["80x16"]["note"]
    assert cells["ours"]["80x16"]["seconds"] == [40.0]  # over the budget of a cell after one run
    assert cells["ours:mean"]["80x16"]["note"]
    assert cells["a"]["80x16"]["seconds"] == [30.0, 30.0]
    assert cells["short"]["8x16"]["seconds"] == [0.1] * 11
    assert log.count(("short", "8x16")) == 14  # each turn of short runs is warmed up
    others = [turn for turn in log if turn[0] in ("a", "slow")]
    assert all(one != two for one, two in itertools.pairwise(others))


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["-", "amx"])
@pytest.mark.parametrize("precision", peaks.PRECISIONS)
def test_a_peak_counts_the_products_that_its_loop_computes(precision: str, hidden: str) -> None:
    """On the best instructions and, where those are tiles, on the vectors below; in several threads."""
    pytest.importorskip("llvmlite")
    chosen = peaks.instruction(precision, {name for name in peaks.host_features() if name.split("-")[0] != hidden})
    if chosen is None:
        pytest.skip(f"this machine multiplies no {precision}")
    loop, _alive = peaks.compiled_loop(precision, chosen)
    found = list(ThreadPoolExecutor(3).map(loop, [1000] * 3))
    products = sum(int(sums.sum(dtype="float64")) for sums in found)
    assert products == 3 * 1000 * chosen.operations // 2, (chosen, products)
    assert all((sums == sums[0]).all() for sums in found)
