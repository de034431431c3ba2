"""What every test shares: fixed seeds, poisoned allocations, and caches that are not the user's."""

from __future__ import annotations

import atexit
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before the libraries load: what a kernel allocates is NaN until it is written.
os.environ["DITSCALE_POISON"] = "1"
_cache = tempfile.mkdtemp(prefix="ditscale-test-cache-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["DITSCALE_CACHE"] = _cache
# Workers share the cores: with two threads each, each waits for the other's.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# Without a GPU Triton's kernels run in its interpreter, which it asks for once, when it is imported: whichever test comes first.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    torch = sys.modules.get("torch")  # tests of rooms without torch do not pay for its import
    if torch is None:
        yield
        return
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:  # a command chose its own; the next test's would wait for the other worker's
        torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> None:
    """Torch computes on one thread; `_same_start` puts their number back."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``ditscale`` in this process: (exit code, stdout, stderr). Most of a small command's time is its imports."""
    from ditscale import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ditscale", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            cli.main()
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return call
