"""Packaging that pyproject.toml cannot say: the native libraries, and a wheel tag without a Python version."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Command, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools" / "build"))
import native_build  # noqa: E402


class BuildNative(Command):
    """`python setup.py build_native --inplace`: compile into ditscale/lib, where a checkout runs from."""

    description = "compile the native libraries"
    user_options = [("inplace", "i", "into the source tree")]
    boolean_options = ["inplace"]

    def initialize_options(self) -> None:
        self.inplace = False

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        for library in native_build.build_all(ROOT / "ditscale" / "lib"):
            native_build.say(f"built {library.name}")


setup(cmdclass={"build_native": BuildNative})
