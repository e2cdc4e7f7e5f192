"""Compile the kernels ahead of time into one library that needs neither Numba nor Python.

    python -m numpyesm.kernels.build -o DIR                  every level of this architecture
    python -m numpyesm.kernels.build -o DIR --levels host    those that this machine can run; best: its best one

It needs Numba (`pip install 'numpyesm[fast]'`) and a C compiler (`CC`, else cc, gcc or clang), which links.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import InvalidOption, MissingExtra, NumpyesmError
from .compiled.isa import BUILD_FOR, host_isa, host_levels, levels, portable_cpu
from .compiled.library import abi, library_name

_ROOT = Path(__file__).resolve().parents[2]


class BuildFailed(NumpyesmError):
    """The library could not be made; the message says at which step."""


def linker() -> list[str] | None:
    """Return the command of the C compiler; None if there is none, BuildFailed if `CC` names none."""
    chosen = os.environ.get("CC", "")
    try:
        command = shlex.split(chosen)
    except ValueError as error:
        raise BuildFailed(f"CC={chosen}: {error}") from error
    if not command:
        return next(([name] for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    if shutil.which(command[0]) is None:
        raise BuildFailed(f"CC={chosen}: there is no command {command[0]}")
    return command


def check_levels(names: str) -> list[str]:
    """Return levels from `all`, `host` (those of this machine), `best` (of those) or names separated by commas.

    Raises
    ------
    InvalidOption
        An unknown level.
    """
    known = list(levels())
    chosen = {"all": known, "host": list(host_levels()), "best": [host_isa().name]}.get(names)
    if chosen is None:
        chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
        if unknown := [name for name in chosen if name not in known]:
            raise InvalidOption(
                f"level {unknown[0]!r} is unknown; there are {', '.join(known)}; or say all, host or best"
            )
    return chosen


def build(folder: Path, names: Sequence[str]) -> Path:
    """Compile some levels and link them.

    Parameters
    ----------
    folder : Path
        Where the library goes, under `library_name()`.
    names : sequence of str
        Levels.

    Returns
    -------
    Path
        The library; it is complete, or what was there before is untouched.

    Raises
    ------
    MissingExtra
        Numba is not installed.
    BuildFailed
        No C compiler, or a step failed.
    OSError
        `folder` cannot be written to.
    """
    if importlib.util.find_spec("numba") is None:
        raise MissingExtra("compiling kernels needs Numba: pip install 'numpyesm[fast]'")
    compiler = linker()
    if compiler is None:
        raise BuildFailed("there is no C compiler to link with: none of cc, gcc and clang is found, and CC is not set")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as temporary:
        room = Path(temporary)
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = list(pool.map(lambda name: _compile(name, room), names))
        source = room / "abi.c"
        export = "__declspec(dllexport) " if sys.platform == "win32" else ""
        source.write_text(f'{export}const char numpyesm_abi[] = "{abi()}";\n')
        made = room / library_name()
        options = [] if sys.platform == "win32" else ["-fPIC"]
        if sys.platform.startswith("linux"):
            options.append("-Wl,-z,defs")  # what needs more than the C library is an error here, not at load
        _run([*compiler, "-shared", *options, "-o", str(made), str(source), *map(str, objects)], "linking")
        target = folder / library_name()
        os.replace(made, target)
    return target


def _compile(name: str, room: Path) -> Path:
    """One level in a process of its own: its shapes are constants of the modules that emit code."""
    cpu, features = portable_cpu(levels()[name])
    output = room / f"{name}.o"
    # Settings for what Numba compiles elsewhere, to debug it say, are not for this.
    environment = {key: value for key, value in child_environment().items() if not key.startswith("NUMBA_")}
    environment |= {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, BUILD_FOR: name}
    environment["NUMBA_CACHE_DIR"] = str(room / f"numba-{name}")
    command = [sys.executable, "-m", "numpyesm.kernels.numba_.code", str(output)]
    _run(command, f"compiling for {name}", environment)
    return output


def child_environment(**variables: str) -> dict[str, str]:
    """Environment of a process that imports this numpyesm and compiles, with some variables more."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **variables}


def _run(command: list[str], step: str, environment: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        raise BuildFailed(f"{step} failed, with exit code {done.returncode}:\n{shlex.join(command)}\n{said}".rstrip())


def main(arguments: list[str] | None = None) -> int:
    """The command line; 1 if the library could not be made."""
    parser = argparse.ArgumentParser(
        prog="python -m numpyesm.kernels.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the library")
    parser.add_argument(
        "--levels", default="all", help=f"all, host, best, or some of {','.join(levels())} (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        names = check_levels(options.levels)
    except InvalidOption as error:
        parser.error(f"--levels {options.levels}: {error}")
    try:
        made = build(options.output, names)
    except (NumpyesmError, OSError) as error:
        print(f"numpyesm.kernels.build: error: {error}", file=sys.stderr)
        return 1
    print(f"{made}: {made.stat().st_size / 1e6:.2f} MB, {', '.join(names)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
