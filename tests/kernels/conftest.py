"""The backends that the kernel tests run on. Without a GPU, Triton runs in its interpreter and the CUDA source on the host."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # cases.py, shared by these files only
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import pytest  # noqa: E402

from ditscale.kernels import library  # noqa: E402


@pytest.fixture(params=["reference", "cpu", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("triton is not installed")
    if name == "cpu" and library.missing_reason("cpu"):
        pytest.skip(str(library.missing_reason("cpu")))
    return name


@pytest.fixture
def native() -> None:
    """The compiled CPU library, for tests that are about it."""
    reason = library.missing_reason("cpu")
    if reason:
        pytest.skip(reason)
