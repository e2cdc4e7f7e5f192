"""The machine's own peak: loops of multiply-adds that never leave the registers, on one thread and on several.

`python -m bench.peaks PRECISION THREADS` prints one JSON object whose `method` names the instruction: Intel's AMX tiles
where the CPU has them and the system grants them, else the widest vectors. Each precision runs in a process of its own:
LLVM ends the process if a CPU lacks an instruction.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from numpyesm.kernels.compiled.isa import tiles_granted

from .client import run_python

PRECISIONS = ("fp32", "bf16", "int8")
_SECONDS = 0.1  # of one timed stretch
_STRETCHES = 20  # short and many: the best of them is undisturbed even on a busy machine
_ONE: dict[str, np.generic] = {"fp32": np.float32(1), "bf16": np.uint16(0x3F80), "int8": np.uint8(1)}
_TILE = "tile"  # AMX: 16 rows of 64 bytes
_TILE_ROWS, _TILE_ROW_BYTES, _TILES = 16, 64, 8


class Instruction(NamedTuple):
    """One multiply-add instruction."""

    name: str  # LLVM's intrinsic
    lanes: int  # 32-bit accumulators in a register
    per_lane: int  # products that each accumulator takes up
    registers: int  # accumulators in flight: enough to hide the latency, two registers left for the factors
    factor: str  # LLVM type of both factors, or `tile`

    @property
    def operations(self) -> int:
        """Multiplications and additions of one turn of the loop."""
        return 2 * self.lanes * self.per_lane * self.registers


def instructions() -> dict[str, list[tuple[set[str], Instruction]]]:
    """Features that each instruction needs, by precision, widest first."""
    avx512_bf16, neon_bf16 = "llvm.x86.avx512bf16.dpbf16ps.512", "llvm.aarch64.neon.bfdot.v4f32.v8bf16"
    return {
        "fp32": [
            ({"avx512f"}, Instruction("llvm.fma.v16f32", 16, 1, 24, "<16 x float>")),
            ({"fma"}, Instruction("llvm.fma.v8f32", 8, 1, 12, "<8 x float>")),
            ({"neon"}, Instruction("llvm.fma.v4f32", 4, 1, 24, "<4 x float>")),
        ],
        "bf16": [
            ({"amx-tile", "amx-bf16"}, Instruction("llvm.x86.tdpbf16ps", 256, 32, _TILES - 2, _TILE)),
            ({"avx512f", "avx512bf16"}, Instruction(avx512_bf16, 16, 2, 24, "<32 x bfloat>")),
            ({"neon", "bf16"}, Instruction(neon_bf16, 4, 2, 24, "<8 x bfloat>")),
        ],
        "int8": [
            ({"amx-tile", "amx-int8"}, Instruction("llvm.x86.tdpbusd", 256, 64, _TILES - 2, _TILE)),
            ({"avx512f", "avx512vnni"}, Instruction("llvm.x86.avx512.vpdpbusd.512", 16, 4, 24, "<64 x i8>")),
            ({"avxvnni"}, Instruction("llvm.x86.avx512.vpdpbusd.256", 8, 4, 12, "<32 x i8>")),
            ({"neon", "dotprod"}, Instruction("llvm.aarch64.neon.sdot.v4i32.v16i8", 4, 4, 24, "<16 x i8>")),
        ],
    }


def instruction(precision: str, features: set[str]) -> Instruction | None:
    """The widest instruction of the CPU for a precision; None if it has none."""
    return next((found for needed, found in instructions()[precision] if needed <= features), None)


def ir_of(chosen: Instruction) -> str:
    """LLVM IR of `void loop(i64 turns, float or i32 *sink, i8 *factors)`."""
    declarations, before, phis, turn, after = (_tile_loop if chosen.factor == _TILE else _vector_loop)(chosen)
    return f"""
{declarations}
define void @loop(i64 %turns, ptr %sink, ptr %factors) {{
entry:
{before}
  br label %body
body:
  %i = phi i64 [0, %entry], [%next, %body]
{phis}
{turn}
  %next = add i64 %i, 1
  %more = icmp slt i64 %next, %turns
  br i1 %more, label %body, label %done
done:
{after}
  ret void
}}
"""


def _each(template: str, chosen: Instruction) -> str:
    """The template for each accumulator R, whose results are BYTES apart."""
    lines = (template.replace("BYTES", str(4 * chosen.lanes * r)).replace("R", str(r)) for r in range(chosen.registers))
    return "\n".join(lines)


def _vector_loop(chosen: Instruction) -> tuple[str, ...]:
    """Declarations, and the lines before, at the head of, inside and after the loop."""
    name, factor = chosen.name, chosen.factor
    vector = f"<{chosen.lanes} x {'i32' if 'i8' in factor or 'i32' in factor else 'float'}>"
    types, values = [factor, factor, vector], [f"{factor} %a", f"{factor} %b", f"{vector} %accR"]
    if not name.startswith("llvm.fma"):  # the dot products take the accumulator first
        types, values = [types[2], *types[:2]], [values[2], *values[:2]]
    return (
        f"declare {vector} @{name}({', '.join(types)})",
        "\n".join(f"%{letter} = load {factor}, ptr %factors, align 4" for letter in "ab"),
        _each(f"%accR = phi {vector} [zeroinitializer, %entry], [%newR, %body]", chosen),
        _each(f"%newR = call {vector} @{name}({', '.join(values)})", chosen),
        _each(f"%pR = getelementptr i8, ptr %sink, i64 BYTES\nstore {vector} %newR, ptr %pR, align 4", chosen),
    )


def _tile_loop(chosen: Instruction) -> tuple[str, ...]:
    """The same on tiles: accumulators are tiles 0 to n - 1, the factors the two after them.

    The tiles' state belongs to a thread: whoever calls the loop gets it configured, and released again.
    """
    row, a, b = _TILE_ROW_BYTES, chosen.registers, chosen.registers + 1
    # Palette 1, then from byte 16 the bytes of a row and from byte 48 the rows of each tile.
    shape = bytes([1, *[0] * 15, *[row, 0] * _TILES, *[0] * 16, *[_TILE_ROWS] * _TILES, *[0] * 8])
    return (
        f"""
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8 immarg)
declare void @llvm.x86.tileloadd64(i8 immarg, ptr, i64)
declare void @llvm.x86.tilestored64(i8 immarg, ptr, i64)
declare void @{chosen.name}(i8 immarg, i8 immarg, i8 immarg)
@shape = private constant [64 x i8] [{", ".join(f"i8 {byte}" for byte in shape)}], align 64""",
        "call void @llvm.x86.ldtilecfg(ptr @shape)\n"
        + _each("call void @llvm.x86.tilezero(i8 R)\n", chosen)
        + "\n".join(f"call void @llvm.x86.tileloadd64(i8 {tile}, ptr %factors, i64 {row})" for tile in (a, b)),
        "",
        _each(f"call void @{chosen.name}(i8 R, i8 {a}, i8 {b})", chosen),
        _each(
            f"%pR = getelementptr i8, ptr %sink, i64 BYTES\ncall void @llvm.x86.tilestored64(i8 R, ptr %pR, i64 {row})",
            chosen,
        )
        + "\ncall void @llvm.x86.tilerelease()",
    )


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


def measure(precision: str, threads: int) -> dict[str, Any]:
    """Billions of operations per second of the widest instruction, by number of threads."""
    chosen = instruction(precision, host_features())
    if chosen is None:
        return {"missing": f"this CPU has no {precision} multiply-add"}
    loop, _alive = compiled_loop(precision, chosen)
    turns = 100_000
    while (seconds := _timed(loop, turns, 1)) < _SECONDS / 4:
        turns *= 4
    turns = int(turns * _SECONDS / seconds)
    gops = {
        str(count): count * turns * chosen.operations / min(_timed(loop, turns, count) for _ in range(_STRETCHES)) / 1e9
        for count in sorted({1, threads})
    }
    return {"method": chosen.name, "gops": gops}


def _timed(loop: Callable[[int], Any], turns: int, threads: int) -> float:
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(loop, [turns] * threads))
        return time.perf_counter() - start


def machine_peaks(python: Path, threads: int) -> dict[str, dict[str, Any]]:
    """All precisions, each in a process of its own: `{precision: {method, gops: {threads: peak}}}`."""
    found: dict[str, dict[str, Any]] = {}
    for precision in PRECISIONS:
        run = run_python(python, threads, "-m", "bench.peaks", precision, str(threads))
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1][:200]
        found[precision] = json.loads(run.stdout) if run.returncode == 0 else {"missing": reason}
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
