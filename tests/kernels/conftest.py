"""The backends that the kernel tests run on. Without a GPU, Triton runs in its interpreter and the CUDA source on the host."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # cases.py, shared by these files only

import pytest
from attention_cases import QUICK_EMULATED, QUICK_INTERPRETED

from ditscale.kernels import dispatch, interpreter, library
from ditscale.kernels.adaln import shapes as adaln_shapes
from ditscale.kernels.attn import shapes as attn_shapes
from ditscale.kernels.gelu import shapes as gelu_shapes
from ditscale.kernels.rotary import shapes as rotary_shapes

ROOT = Path(__file__).resolve().parents[2]
if dispatch.interpreting() and importlib.util.find_spec("triton"):
    interpreter.hasten()


# Interpreted tests of which one in two or three cases is quick, such that every two values of two parameters still meet.
PAIRED = {
    "test_adaln_values.py": {
        "test_values_and_gradients": 2,
        "test_shared_and_per_token_modulation": 2,
        "test_rms_norm": 2,
        "test_affine_weight_and_bias": 2,
        "test_gate_residual": 3,
    },
    "test_gelu.py": {"test_values_and_gradients": 3},
    "test_rotary.py": {"test_values_and_gradients[triton-dit-xl": 3},
}


def left_to_slow_tests(item: pytest.Item, params: dict[str, object], seen: dict[tuple[str, ...], list[str]]) -> bool:
    """Whether ``PAIRED`` leaves this case out: a diagonal of the table of all cases holds every pair. ``seen`` numbers values."""
    for name, share in PAIRED.get(item.path.name, {}).items():
        if item.name.startswith(name + "[" if "[" not in name else name):
            number = 0
            for parameter, value in params.items():
                values = seen.setdefault((item.path.name, name, parameter), [])
                if repr(value) not in values:
                    values.append(repr(value))
                number += values.index(repr(value))
            return number % share != 0
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On the backends that interpret or emulate a GPU all but a few cases of attention and rotations are slow tests, and of
    others in the interpreter all but those that ``PAIRED`` keeps.
    """
    seen: dict[tuple[str, ...], list[str]] = {}
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if params.get("backend") not in ("triton", "emulated"):
            continue
        if params["backend"] == "triton" and left_to_slow_tests(item, params, seen):
            item.add_marker(pytest.mark.slow)
        name = getattr(item, "originalname", "")
        if item.path.name.startswith("test_attention"):
            tables = (QUICK_INTERPRETED, QUICK_EMULATED) if params["backend"] == "emulated" else (QUICK_INTERPRETED,)
            patterns = [table[name] for table in tables if name in table]
            quick = "|".join(patterns) if patterns else None
        elif item.path.name == "test_rotary.py" and name == "test_values_and_gradients":
            quick = "dit-xl|odd-half.*fp32|demo-rms|one-rms|many-tokens-rms-halves-fp32"
        else:
            continue
        if quick is None or not re.search(quick, item.name):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=["reference", "cpu", "triton", "emulated"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name to pass as ``backend``. "emulated" asks for the CPU kernels and is given the CUDA ones on the host, which may do
    nothing that a GPU forbids."""
    name: str = request.param
    if name == "emulated":
        counts = request.getfixturevalue("shim_counts")
        monkeypatch.setitem(dispatch._eager, "cpu", request.getfixturevalue("emulated_operators"))
        monkeypatch.setattr(dispatch, "_chosen", {})
        monkeypatch.setattr(dispatch, "_quick", {})
        yield "cpu"
        races, _, misaligned, _ = counts()
        assert (races, misaligned) == (0, 0), "races, and wide accesses at addresses that are not aligned"
        return
    if name == "triton" and not importlib.util.find_spec("triton"):
        pytest.skip("triton is not installed")
    if name == "cpu" and library.missing_reason("cpu"):
        pytest.skip(str(library.missing_reason("cpu")))
    yield name


@pytest.fixture
def native() -> None:
    """The compiled CPU library, for tests that are about it."""
    reason = library.missing_reason("cpu")
    if reason:
        pytest.skip(reason)


@pytest.fixture(params=["portable", "avx2"])
def lesser_isa(native: None, request: pytest.FixtureRequest) -> str:
    """An instruction set below this process's own. It is chosen once a process: DITSCALE_CPU_ISA asks another for it."""
    own = library.cpu_isa()
    if own in ("portable", request.param):
        pytest.skip(f"every test of this process runs on {own}")
    return str(request.param)


@pytest.fixture(scope="session")
def emulated_operators(request: pytest.FixtureRequest) -> object:
    """``torch.ops.ditscale_emulated``: the CUDA source compiled for the host, built once for a state of csrc/ and torch."""
    sys.path.insert(0, str(ROOT / "tools" / "build"))
    import native_build

    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA source for the host")
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted([*(ROOT / "csrc" / "cuda").iterdir(), *(ROOT / "csrc" / "common").iterdir()]):
        digest.update(path.read_bytes())
    cache = request.config.cache
    assert cache is not None
    folder = Path(cache.mkdir("ditscale-emulated")) / digest.hexdigest()[:16]
    library_file = folder / "libditscale_emulated.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two workers one builds, with all cores
        if not library_file.is_file():
            native_build.build_emulated(folder)
    torch.ops.load_library(str(library_file))
    definitions = torch.library.Library("ditscale_emulated", "FRAGMENT")
    for family in (adaln_shapes, attn_shapes, gelu_shapes, rotary_shapes):
        for name, operator in family.OPERATORS.items():
            definitions.define(name + operator.schema)
    _definitions.append(definitions)
    return torch.ops.ditscale_emulated


_definitions: list[torch.library.Library] = []


@pytest.fixture
def shim_counts(emulated_operators: object) -> Callable[..., list[int]]:
    """What the emulated kernels did since the last call: races, bank conflicts, addresses not aligned, multiply-adds of matrix
    instructions; and sets the order of warps from now on (``backwards``)."""
    path = next(p for p in torch.ops.loaded_libraries if "libditscale_emulated" in p)
    function = ctypes.CDLL(path).ditscale_shim_counts

    def count(backwards: bool = False) -> list[int]:
        out = (ctypes.c_int64 * 4)()
        function(out, ctypes.c_bool(backwards))
        return list(out)

    count()
    return count
