"""The machine's own peak: loops of fused multiply-adds that never leave the registers, one thread and N threads.

`python -m bench.peaks PRECISION THREADS` prints one JSON object, whose `method` names the instruction: Intel's AMX
tiles where the CPU has them and the system grants them, else the widest vectors. Each precision runs in a process of
its own: LLVM ends the process when a CPU has no such instruction.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .client import child_environment
from .engines import ROOT

PRECISIONS = ("fp32", "bf16", "int8")
_SECONDS = 0.1  # of one timed stretch
_STRETCHES = 10  # short and many: the best of them is undisturbed even on a busy machine
_ONE: dict[str, np.generic] = {"fp32": np.float32(1), "bf16": np.uint16(0x3F80), "int8": np.uint8(1)}
_TILE = "tile"  # AMX: 16 rows of 64 bytes
_TILE_ROWS, _TILE_ROW_BYTES, _TILES = 16, 64, 8


@dataclass(frozen=True)
class Instruction:
    """One multiply-add instruction.

    Attributes
    ----------
    name : str
        LLVM's intrinsic.
    lanes : int
        32-bit accumulators in a register.
    per_lane : int
        Products that each accumulator takes up: 1 for fp32, 2 for bf16, 4 for int8; 16 times as many in a tile.
    registers : int
        Accumulators in flight: enough to hide the latency, and two registers left for the factors.
    factor : str
        LLVM type of both factors, or `tile`.
    """

    name: str
    lanes: int
    per_lane: int
    registers: int
    factor: str

    @property
    def operations(self) -> int:
        """Multiplications and additions of one turn of the loop."""
        return 2 * self.lanes * self.per_lane * self.registers


def instruction(precision: str, features: set[str]) -> Instruction | None:
    """The widest instruction of the CPU for a precision; None if it has none."""
    x86_512 = "avx512f" in features
    by_precision: dict[str, list[tuple[bool, Instruction]]] = {
        "fp32": [
            (x86_512, Instruction("llvm.fma.v16f32", 16, 1, 24, "<16 x float>")),
            ("fma" in features, Instruction("llvm.fma.v8f32", 8, 1, 12, "<8 x float>")),
            ("neon" in features, Instruction("llvm.fma.v4f32", 4, 1, 24, "<4 x float>")),
        ],
        "bf16": [
            ({"amx-tile", "amx-bf16"} <= features, Instruction("llvm.x86.tdpbf16ps", 256, 32, _TILES - 2, _TILE)),
            (
                x86_512 and "avx512bf16" in features,
                Instruction("llvm.x86.avx512bf16.dpbf16ps.512", 16, 2, 24, "<32 x bfloat>"),
            ),
            (
                "neon" in features and "bf16" in features,
                Instruction("llvm.aarch64.neon.bfdot.v4f32.v8bf16", 4, 2, 24, "<8 x bfloat>"),
            ),
        ],
        "int8": [
            ({"amx-tile", "amx-int8"} <= features, Instruction("llvm.x86.tdpbusd", 256, 64, _TILES - 2, _TILE)),
            (
                x86_512 and "avx512vnni" in features,
                Instruction("llvm.x86.avx512.vpdpbusd.512", 16, 4, 24, _vnni_factor(16)),
            ),
            ("avxvnni" in features, Instruction("llvm.x86.avx512.vpdpbusd.256", 8, 4, 12, _vnni_factor(8))),
            (
                "neon" in features and "dotprod" in features,
                Instruction("llvm.aarch64.neon.sdot.v4i32.v16i8", 4, 4, 24, "<16 x i8>"),
            ),
        ],
    }
    return next((found for possible, found in by_precision[precision] if possible), None)


def _vnni_factor(lanes: int) -> str:
    """LLVM 22 changed the type of vpdpbusd's factors from 32-bit integers to bytes."""
    binding: Any = import_module("llvmlite.binding")
    return f"<{4 * lanes} x i8>" if binding.llvm_version_info[0] >= 22 else f"<{lanes} x i32>"


def ir_of(chosen: Instruction) -> str:
    """LLVM IR of `void loop(i64 turns, float or i32 *sink, i8 *factors)`."""
    if chosen.factor == _TILE:
        return _ir_of_tiles(chosen)
    integer = "i8" in chosen.factor or "i32" in chosen.factor
    element = "i32" if integer else "float"
    vector = f"<{chosen.lanes} x {element}>"
    zero = "zeroinitializer"
    # LLVM's fma takes (a, b, accumulator), the dot products take (accumulator, a, b).
    fma = chosen.name.startswith("llvm.fma")
    order = [chosen.factor, chosen.factor, vector] if fma else [vector, chosen.factor, chosen.factor]
    lines = [f"declare {vector} @{chosen.name}({', '.join(order)})"]
    lines += ["define void @loop(i64 %turns, ptr %sink, ptr %factors) {", "entry:"]
    lines += [
        f"  %a = load {chosen.factor}, ptr %factors, align 4",
        f"  %b = load {chosen.factor}, ptr %factors, align 4",
    ]
    lines += ["  br label %body", "body:", "  %i = phi i64 [0, %entry], [%next, %body]"]
    registers = range(chosen.registers)
    lines += [f"  %acc{r} = phi {vector} [{zero}, %entry], [%new{r}, %body]" for r in registers]
    for r in registers:
        a, b, acc = f"{chosen.factor} %a", f"{chosen.factor} %b", f"{vector} %acc{r}"
        arguments = ", ".join([a, b, acc] if fma else [acc, a, b])
        lines.append(f"  %new{r} = call {vector} @{chosen.name}({arguments})")
    lines += ["  %next = add i64 %i, 1", "  %more = icmp slt i64 %next, %turns"]
    lines += ["  br i1 %more, label %body, label %done", "done:"]
    for r in registers:
        lines.append(f"  %p{r} = getelementptr {vector}, ptr %sink, i64 {r}")
        lines.append(f"  store {vector} %new{r}, ptr %p{r}, align 4")
    return "\n".join([*lines, "  ret void", "}"])


def _ir_of_tiles(chosen: Instruction) -> str:
    """The same on tiles: accumulators are tiles 0 to n - 1, the factors the two after them.

    The state of the tiles belongs to a thread: whoever calls the loop gets it configured, and released again.
    """
    accumulators, row = range(chosen.registers), _TILE_ROW_BYTES
    a, b = chosen.registers, chosen.registers + 1
    # Palette 1, then from byte 16 the bytes of a row and from byte 48 the rows of each tile.
    shape = bytes([1, *[0] * 15, *[row, 0] * _TILES, *[0] * 16, *[_TILE_ROWS] * _TILES, *[0] * 8])
    lines = ["declare void @llvm.x86.ldtilecfg(ptr)", "declare void @llvm.x86.tilerelease()"]
    lines += ["declare void @llvm.x86.tilezero(i8 immarg)"]
    lines += [f"declare void @llvm.x86.tile{do}64(i8 immarg, ptr, i64)" for do in ("loadd", "stored")]
    lines += [f"declare void @{chosen.name}(i8 immarg, i8 immarg, i8 immarg)"]
    lines += [f"@shape = private constant [64 x i8] [{', '.join(f'i8 {byte}' for byte in shape)}], align 64"]
    lines += ["define void @loop(i64 %turns, ptr %sink, ptr %factors) {", "entry:"]
    lines += ["  call void @llvm.x86.ldtilecfg(ptr @shape)"]
    lines += [f"  call void @llvm.x86.tilezero(i8 {r})" for r in accumulators]
    lines += [f"  call void @llvm.x86.tileloadd64(i8 {r}, ptr %factors, i64 {row})" for r in (a, b)]
    lines += ["  br label %body", "body:", "  %i = phi i64 [0, %entry], [%next, %body]"]
    lines += [f"  call void @{chosen.name}(i8 {r}, i8 {a}, i8 {b})" for r in accumulators]
    lines += ["  %next = add i64 %i, 1", "  %more = icmp slt i64 %next, %turns"]
    lines += ["  br i1 %more, label %body, label %done", "done:"]
    for r in accumulators:
        lines.append(f"  %p{r} = getelementptr i8, ptr %sink, i64 {4 * chosen.lanes * r}")
        lines.append(f"  call void @llvm.x86.tilestored64(i8 {r}, ptr %p{r}, i64 {row})")
    return "\n".join([*lines, "  call void @llvm.x86.tilerelease()", "  ret void", "}"])


def tiles_granted() -> bool:
    """Ask the system for AMX's tiles, once for the whole process: without it the first instruction kills it."""
    if not (sys.platform == "linux" and platform.machine() == "x86_64"):
        return False
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def host_features() -> set[str]:
    """Features that this process may use, in LLVM's names."""
    llvm: Any = import_module("llvmlite.binding")
    features = {name for name, present in llvm.get_host_cpu_features().items() if present}
    if "amx-tile" in features and not tiles_granted():
        features = {name for name in features if not name.startswith("amx-")}
    return features


def compiled_loop(precision: str, chosen: Instruction) -> tuple[Callable[[int], npt.NDArray[Any]], Any]:
    """The loop as a function of its turns, safe in several threads, and what keeps its code alive.

    All factors are 1, so each accumulator that it returns holds how many products it has taken up.
    """
    llvm: Any = import_module("llvmlite.binding")
    for prepare in ("initialize_native_target", "initialize_native_asmprinter"):
        getattr(llvm, prepare)()
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    module = llvm.parse_assembly(ir_of(chosen))
    module.verify()
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    # A foreign call through ctypes releases the GIL.
    call = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)(engine.get_function_address("loop"))
    # The text goes to code generation as it is: no pass runs that could see that all accumulators are equal.
    one = _ONE[precision]
    factors = np.full(_TILE_ROWS * _TILE_ROW_BYTES // one.itemsize, one)

    def loop(turns: int) -> npt.NDArray[Any]:
        sink = np.empty(chosen.registers * chosen.lanes, np.int32 if precision == "int8" else np.float32)
        call(turns, sink.ctypes.data, factors.ctypes.data)
        return sink

    return loop, (engine, call)


def measure_instruction(precision: str, threads: int) -> dict[str, Any]:
    """Operations a second of the widest instruction, in billions."""
    llvm: Any = import_module("llvmlite.binding")
    if hasattr(llvm, "initialize"):
        with contextlib.suppress(RuntimeError):  # newer llvmlite does it by itself
            llvm.initialize()
    chosen = instruction(precision, host_features())
    if chosen is None:
        return {"missing": f"this CPU has no {precision} multiply-add"}
    loop, _alive = compiled_loop(precision, chosen)
    turns = 100_000
    while (seconds := _timed(loop, turns, 1)) < _SECONDS / 4:
        turns *= 4
    turns = int(turns * _SECONDS / seconds)
    samples = {
        str(count): [count * turns * chosen.operations / _timed(loop, turns, count) / 1e9 for _ in range(_STRETCHES)]
        for count in sorted({1, threads})
    }
    return {"method": chosen.name, "samples": samples, "gops": {count: max(found) for count, found in samples.items()}}


def _timed(loop: Callable[[int], Any], turns: int, threads: int) -> float:
    workers = [threading.Thread(target=loop, args=(turns,)) for _ in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - start


def measure_sgemm(threads: int) -> dict[str, Any]:
    """Without llvmlite: a large product in NumPy's BLAS, a lower bound; the environment sets its threads."""
    a = np.random.default_rng(0).random((2048, 2048), np.float32)
    a @ a
    samples = []
    for _ in range(_STRETCHES):
        start = time.perf_counter()
        a @ a
        samples.append(2 * 2048**3 / (time.perf_counter() - start) / 1e9)
    return {"method": "NumPy sgemm 2048", "samples": {str(threads): samples}, "gops": {str(threads): max(samples)}}


def machine_peaks(python: Path, threads: int) -> dict[str, dict[str, Any]]:
    """All precisions, each in a process of its own: `{precision: {method, samples, gops: {threads: peak}}}`."""
    found: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS:
        run = subprocess.run(
            [str(python), "-m", "bench.peaks", precision, str(threads)],
            cwd=ROOT,
            env=child_environment(threads),
            capture_output=True,
            text=True,
            check=False,
        )
        if run.returncode:
            lines = run.stderr.strip().splitlines()
            found[precision] = {"missing": lines[-1][:200] if lines else f"exit code {run.returncode}"}
        else:
            found[precision] = json.loads(run.stdout)
    return found


def best_of(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Two measurements of the same run, before and after: the samples of both, the better peak."""
    merged = {}
    for precision, one in first.items():
        other = second.get(precision, {})
        if "gops" not in one or "gops" not in other:
            merged[precision] = one if "gops" in one else other or one
            continue
        samples = {count: one["samples"][count] + other["samples"][count] for count in one["samples"]}
        gops = {count: max(values) for count, values in samples.items()}
        merged[precision] = {"method": one["method"], "samples": samples, "gops": gops}
    return merged


def main() -> None:
    precision, threads = sys.argv[1], int(sys.argv[2])
    try:
        result = measure_instruction(precision, threads)
    except ImportError:
        missing = {"missing": "needs llvmlite (it comes with numba)"}
        result = measure_sgemm(threads) if precision == "fp32" else missing
    print(json.dumps(result))


if __name__ == "__main__":
    main()
