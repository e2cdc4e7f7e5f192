"""Compile the library while the wheel is built, and name the platform it is for."""

import os
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from numpyesm._version import __version__  # noqa: E402
from numpyesm.kernels.build import build, check_levels  # noqa: E402


class BuildLibrary(build_py):
    """Put the library beside the package's only module."""

    def run(self):
        super().run()
        levels = check_levels(os.environ.get("NUMPYESM_KERNEL_LEVELS", "all"))
        build(Path(self.build_lib) / "numpyesm_kernels", levels)


class WithLibrary(Distribution):
    """Goes where machine code goes, though no extension module is declared."""

    def has_ext_modules(self):
        return True


class PlatformWheel(bdist_wheel):
    """Any Python 3, one kind of machine."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(version=__version__, distclass=WithLibrary, cmdclass={"build_py": BuildLibrary, "bdist_wheel": PlatformWheel})
