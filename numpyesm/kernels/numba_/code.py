"""Kernels that Numba compiles in this process, or loads from its cache; and as an object file, for `kernels/build.py`.

    NUMPYESM_BUILD_FOR=avx2 python -m numpyesm.kernels.numba_.code OUTPUT

For the file, what Numba has compiled is taken as LLVM IR. Only the kernels keep a name that others see; what else Numba
puts beside them (environments, descriptions of errors) is dropped, as nobody calls it.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba

from ...options import PRECISIONS
from ..compiled.code import Code, needed, symbol
from ..compiled.isa import portable_cpu
from . import attention, layer, load, runner  # noqa: F401  # importing them registers the kernels
from .cache import cache_folder, compile_kernel
from .emitter import ISA

_ready: dict[str, Code] = {}


def numba_code(precision: str) -> Code:
    """Load or compile what `precision` needs; says so on stderr when it has to compile."""
    if precision in _ready:
        return _ready[precision]
    folder = cache_folder()
    mark = None if folder is None else folder / f"{precision}.ready"
    if mark is None or not mark.exists():
        sys.stderr.write("numpyesm: compiling kernels for this CPU (once, some seconds) ...\n")
        sys.stderr.flush()
    addresses = {}
    for name in needed(ISA, precision):
        compiled = compile_kernel(name)
        addresses[name] = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    if mark is not None:
        with suppress(OSError):
            mark.touch()
    return _ready.setdefault(precision, Code(ISA, f"Numba {numba.__version__}", addresses))


def kernel_module(name: str) -> Any:
    """LLVM module of one kernel, of which only that one has a name outside."""
    compiled = compile_kernel(name)
    module = llvm.parse_assembly(compiled.library.get_llvm_str())
    for item in (*module.functions, *module.global_variables):
        if item.is_declaration:
            continue
        if item.name == compiled.fndesc.llvm_func_name:
            item.name, item.linkage = symbol(ISA, name), "external"
            if sys.platform == "win32":
                item.storage_class = "dllexport"
        else:
            item.linkage = "internal"
    return module


def object_code() -> bytes:
    """Position-independent machine code of all kernels of this process's level."""
    cpu, features = portable_cpu(ISA)
    target = llvm.Target.from_triple(llvm.get_process_triple())
    machine = target.create_target_machine(cpu=cpu, features=features, opt=3, reloc="pic", codemodel="default")
    names = dict.fromkeys(name for precision in PRECISIONS for name in needed(ISA, precision))
    whole, *others = map(kernel_module, names)
    for module in others:
        whole.link_in(module)
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(whole, llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options()))
    code: bytes = machine.emit_object(whole)
    return code


if __name__ == "__main__":
    Path(sys.argv[1]).write_bytes(object_code())
