"""The PEP 517 backend: setuptools, asking for torch only where the environment has none to compile against.

pip builds in an isolated environment. Naming torch as a fixed build requirement would download gigabytes for a few headers,
even where the target environment has torch; so this backend looks there first.
"""

from __future__ import annotations

import re
from typing import Any

import native_build
from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401 (the hooks that a frontend looks up here)
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)


def _torch_requirement() -> list[str]:
    folder = native_build.find_torch()
    if folder is None:
        return ["torch>=2.10"]
    found = re.search(r"__version__ = '(\d+)\.(\d+)", (folder / "version.py").read_text())
    old = found is not None and (int(found[1]), int(found[2])) < (2, 10)
    return ["torch>=2.10"] if old else []


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What setuptools asks for, and torch where there is none."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_requirement()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What setuptools asks for, and torch where there is none."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_requirement()]
