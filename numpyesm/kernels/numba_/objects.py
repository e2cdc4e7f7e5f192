"""Machine code of all kernels of one level as an object file, for `kernels/build.py`.

    NUMPYESM_BUILD_FOR=avx2 python -m numpyesm.kernels.numba_.objects OUTPUT

What Numba has compiled is taken as LLVM IR. Only the kernels keep a name that others see; what else Numba puts beside
them (environments, descriptions of errors) is dropped, as nobody calls it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from ...options import PRECISIONS
from ..compiled.code import needed, symbol
from . import attention, layer, runner  # noqa: F401  # importing them registers the kernels
from .cache import compile_kernel
from .emitter import ISA
from .target import portable_cpu


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
