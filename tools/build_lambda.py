"""Make the zip of an AWS Lambda function: NumPy, safetensors, numpyesm, its compiled kernels and weights, no more.

    python tools/build_lambda.py --weights esm2-35m --dtype fp16 -o numpyesm-lambda.zip

The wheels of the target (Linux, Python version, architecture) come from PyPI, whatever this machine is. Tests, docs,
headers and type stubs are left out. Equal inputs give equal bytes. Handler: `numpyesm.serverless.handler`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

# AWS: a function with all its layers, unpacked; and a zip that is uploaded directly, not through S3.
UNPACKED_LIMIT = 262_144_000
DIRECT_UPLOAD_LIMIT = 50 << 20

PACKAGES = ("numpy", "safetensors")
# Every manylinux that the glibc 2.34 of Amazon Linux 2023 takes, newest first.
GLIBC = ("2_34", "2_31", "2_28", "2_27", "2_24", "2_17")

_NEVER_USED = {
    # folders of dependencies, wherever they are
    "tests", "test", "testing_data", "doc", "docs", "examples", "benchmarks", "include", "__pycache__", "f2py",
    "_pyinstaller", "distutils", "bin",
}  # fmt: skip
_NEVER_USED_SUFFIXES = (".pyi", ".h", ".c", ".a", ".pxd", ".pyx", ".lib", ".md", ".rst")
_EPOCH = (1980, 1, 1, 0, 0, 0)


def main(arguments: list[str] | None = None) -> int:
    """Build one zip; the exit code is 1 if it would be too large or something is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="esm2-35m", help="name, file or folder (%(default)s); none for no weights")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16", "int8"], default="fp16", help="(%(default)s)")
    parser.add_argument("--python", default="3.12", metavar="3.X", help="of the Lambda runtime (%(default)s)")
    parser.add_argument("--arch", choices=["x86_64", "aarch64"], default="x86_64", help="(%(default)s)")
    parser.add_argument(
        "--kernels", default="auto", metavar="FILE", help="library of kernels; none for NumPy alone (the installed one)"
    )
    parser.add_argument(
        "--requirement", action="append", metavar="PACKAGE==VERSION", help="instead of the newest; may be repeated"
    )
    parser.add_argument("--limit", type=int, default=UNPACKED_LIMIT, help="bytes unpacked (%(default)s)")
    parser.add_argument("-o", "--output", type=Path, default=Path("numpyesm-lambda.zip"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="numpyesm-lambda-") as folder:
        staging = Path(folder)
        try:
            check_python(options.python)
            check_output(options.output)  # before minutes of work
            kernels = None if options.kernels == "none" else find_kernels(options.kernels, options.arch)
            return _build(staging, options, kernels)
        except (BuildFailed, OSError) as error:
            print(f"build_lambda: error: {error}", file=sys.stderr)
            return 1


class BuildFailed(Exception):
    """Why there is no zip."""


def check_python(version: str) -> None:
    """BuildFailed if numpyesm would not run there."""
    match = re.fullmatch(r"3\.(\d+)", version)
    if match is None or int(match[1]) < 10:
        raise BuildFailed(f"--python {version}: numpyesm needs 3.10 or newer, written as 3.12")


def check_output(output: Path) -> None:
    """BuildFailed if no file can be made there."""
    if output.is_dir():
        raise BuildFailed(f"{output} is a folder: name the zip, as in -o {output / 'numpyesm-lambda.zip'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise BuildFailed(f"{output} cannot be written ({error.strerror or error})") from error


def find_kernels(named: str, arch: str) -> Path | None:
    """Return the library of kernels that was named, or the one that is installed if it is for the target."""
    from numpyesm.kernels.compiled.isa import levels
    from numpyesm.kernels.compiled.library import find_library, levels_in

    source = Path(named) if named != "auto" else getattr(find_library(), "file", None) or Path()
    if named == "auto" and source.name != f"numpyesm-kernels-{arch}.so":
        how = "pip install ./packaging/kernels on such a machine, and name it with --kernels"
        print(f"build_lambda: no compiled kernels for Linux on {arch}, NumPy will do the work: {how}", file=sys.stderr)
        return None
    inside = levels_in(source, arch) if source.is_file() else "there is no such file"
    if isinstance(inside, str):
        raise BuildFailed(f"--kernels {named}: {inside}")
    if missing := [isa.name for isa in levels(arch).values() if isa.name not in inside and not isa.spelled_out]:
        print(f"build_lambda: warning: {source} has no kernels for {', '.join(missing)}", file=sys.stderr)
    return source


def with_defaults(requirements: list[str]) -> list[str]:
    """These, and the newest of what they do not name."""
    named = {re.split(r"[^\w-]", requirement.strip())[0].lower() for requirement in requirements}
    return [*requirements, *(package for package in PACKAGES if package not in named)]


def _build(staging: Path, options: argparse.Namespace, kernels: Path | None) -> int:
    install_dependencies(staging, with_defaults(options.requirement or []), options.python, options.arch)
    left_out = strip(staging)
    shutil.copytree(ROOT / "numpyesm", staging / "numpyesm", ignore=shutil.ignore_patterns("__pycache__", "*.nb[ci]"))
    if kernels is not None:
        (package := staging / "numpyesm_kernels").mkdir()
        (package / "__init__.py").touch()
        shutil.copyfile(kernels, package / f"numpyesm-kernels-{options.arch}.so")
    if options.weights != "none":
        pack_weights(staging / "weights", options.weights, options.dtype)
    compiled = compile_sources(staging, options.python)
    sizes = {path: path.stat().st_size for path in files(staging)}
    total = sum(sizes.values())
    report(staging, sizes, left_out, compiled, options.limit)
    if total > options.limit:
        raise BuildFailed(
            f"{total / 1e6:.1f} MB unpacked, and Lambda takes {options.limit / 1e6:.1f} MB: "
            "store the weights as int8 or fp16 (--dtype), take a smaller model, or use the container image (Dockerfile)"
        )
    write_zip(staging, options.output)
    packed = options.output.stat().st_size
    advice = "" if packed <= DIRECT_UPLOAD_LIMIT else " (above 50 MB: upload it through S3)"
    print(f"{options.output}: {packed / 1e6:.1f} MB{advice}, handler numpyesm.serverless.handler", file=sys.stderr)
    return 0


def install_dependencies(target: Path, packages: Iterable[str], python: str, arch: str) -> None:
    """Unpack the wheels of another platform; never a source distribution, which would be built for this one."""
    platforms = [f"manylinux_{glibc}_{arch}" for glibc in GLIBC] + [f"manylinux2014_{arch}"]
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", "--no-deps",
        "--only-binary=:all:", "--target", str(target), "--python-version", python, "--implementation", "cp",
        *(part for platform in platforms for part in ("--platform", platform)), *packages,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=sys.stderr, check=False)
    if done.returncode:
        raise BuildFailed(f"pip found no wheels of {', '.join(packages)} for Python {python} on {arch}")


def strip(staging: Path) -> int:
    """Remove what runs nothing; returns the bytes."""
    before = sum(path.stat().st_size for path in files(staging))
    for folder in sorted((p for p in staging.rglob("*") if p.is_dir()), key=lambda p: len(p.parts), reverse=True):
        if folder.name in _NEVER_USED:
            shutil.rmtree(folder)
    for path in list(files(staging)):
        record = path.parent.name.endswith(".dist-info") and path.name in ("RECORD", "direct_url.json", "INSTALLER")
        if record or (path.name.endswith(_NEVER_USED_SUFFIXES) and ".dist-info" not in str(path)):
            path.unlink()
    return before - sum(path.stat().st_size for path in files(staging))


def pack_weights(folder: Path, weights: str, dtype: str) -> None:
    """Convert the weights into the package."""
    from numpyesm.errors import NumpyesmError
    from numpyesm.weights import convert, resolve

    try:
        made = convert(resolve(weights), folder / "weights.safetensors", dtype=dtype)
    except NumpyesmError as error:
        raise BuildFailed(str(error)) from error
    if made.checkpoint.synthetic:
        print("build_lambda: warning: SYNTHETIC weights: this function's numbers will mean nothing", file=sys.stderr)


def compile_sources(staging: Path, python: str) -> bool:
    """Byte code beside the sources, if this Python can make it for the target: /var/task cannot be written to."""
    if python != f"{sys.version_info.major}.{sys.version_info.minor}":
        return False
    code = """
import py_compile, sys
root = sys.argv[1]
for line in sys.stdin:
    name = line.rstrip("\\n")
    try:
        py_compile.compile(f"{root}/{name}", dfile=f"/var/task/{name}", doraise=True, quiet=1,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    except py_compile.PyCompileError:
        pass  # an example that is not meant to run
"""
    names = [str(path.relative_to(staging)) for path in files(staging) if path.suffix == ".py"]
    subprocess.run(
        # A process of its own, with a fixed seed: before Python 3.11 the order of a set of constants is that of hashes.
        [sys.executable, "-S", "-s", "-c", code, str(staging)],
        input="\n".join(names),
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "0", "PATH": os.environ.get("PATH", "")},
    )
    return True


def files(folder: Path) -> Iterator[Path]:
    """All files below a folder, in order of their names."""
    return iter(sorted(path for path in folder.rglob("*") if path.is_file()))


def report(staging: Path, sizes: dict[Path, int], left_out: int, compiled: bool, limit: int) -> None:
    """What takes the room."""
    groups: Counter[str] = Counter()
    for path, size in sizes.items():
        groups[path.relative_to(staging).parts[0]] += size
    total = sum(sizes.values())
    print(f"{'MB':>8}  unpacked")
    for name, size in groups.most_common():
        print(f"{size / 1e6:8.1f}  {name}")
    print(f"{total / 1e6:8.1f}  together, of {limit / 1e6:.1f} allowed; {left_out / 1e6:.1f} stripped")
    print("the largest files:")
    for path, size in sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0]))[:6]:
        print(f"{size / 1e6:8.1f}  {path.relative_to(staging)}")
    if not compiled:
        print("no byte code: build with the target's own Python version for a quicker cold start", file=sys.stderr)


def write_zip(staging: Path, output: Path) -> None:
    """The same bytes for the same files: fixed order, dates and permissions."""
    from numpyesm.files import atomic_write

    with atomic_write(output) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for path in files(staging):
            entry = zipfile.ZipInfo(path.relative_to(staging).as_posix(), _EPOCH)
            entry.external_attr = (0o755 if ".so" in path.name else 0o644) << 16
            entry.create_system = 3  # Unix, wherever this runs
            entry.compress_type = zipfile.ZIP_DEFLATED
            with open(path, "rb") as source, archive.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


if __name__ == "__main__":
    sys.exit(main())
