"""Packaging that pyproject.toml cannot say: the native libraries, and a wheel tag without a Python version."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools" / "build"))
import native_build  # noqa: E402

IN_PLACE = ROOT / "ditscale" / "lib"


class NativeDistribution(Distribution):
    """Compiled, so that the wheel is for a platform and installs beside other compiled packages."""

    def has_ext_modules(self) -> bool:
        return True


class BuildPy(build_py):
    """Copies the Python files, then compiles the libraries beside them (an editable install: into the checkout)."""

    def run(self) -> None:
        super().run()
        native_build.build_all(IN_PLACE if self.editable_mode else Path(self.build_lib) / "ditscale" / "lib")


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the libraries use no Python API, so one wheel serves every Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


class BuildNative(Command):
    """`python setup.py build_native`: compile into ditscale/lib, where a checkout runs from."""

    description = "compile the native libraries into ditscale/lib"
    user_options = [("inplace", "i", "accepted for symmetry with build_ext; it is what this command does")]
    boolean_options = ["inplace"]

    def initialize_options(self) -> None:
        self.inplace = True

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        native_build.build_all(IN_PLACE)


setup(
    distclass=NativeDistribution,
    cmdclass={"build_py": BuildPy, "bdist_wheel": PlatformWheel, "build_native": BuildNative},
)
