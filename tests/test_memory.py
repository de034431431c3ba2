"""Freed memory is kept by those who own their process, and large results of the kernels come in large pages."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from training_cases import tiny

from ditscale import memory
from ditscale.bench import runner
from ditscale.bench.runner import Session
from ditscale.bench.timing import TINY
from ditscale.dit.training import loop, train
from ditscale.memory import keep_memory

# Pages that the system has to give for a result of 64 MiB, of torch and of ours; the fewest, for aligned pieces fit again once
# freed neighbours have joined.
COUNT = """
import json, resource, sys, torch
from ditscale.kernels import layernorm_modulate
from ditscale.memory import keep_memory
kept = sys.argv[1] == "keep" and keep_memory()
x, m = torch.ones(1, 1 << 14, 1 << 10), torch.ones(1 << 10)
def faults(call):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
new = faults(lambda: torch.empty(7 << 20).fill_(1.0))
calls = {"torch": lambda: torch.empty(16 << 20).fill_(1.0), "ours": lambda: layernorm_modulate(x, m, m, backend="cpu")}
print(json.dumps({"kept": kept, "new": new} | {name: min(faults(call) for _ in range(20)) for name, call in calls.items()}))
"""
UNDECIDED = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")


def counted(how: str, *, before: Sequence[str] = ()) -> dict[str, int]:
    done = subprocess.run(
        [*before, sys.executable, "-c", COUNT, how],
        capture_output=True,
        text=True,
        env=UNDECIDED | {"DITSCALE_POISON": "0"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def default() -> dict[str, int]:
    """As a program is that asked for nothing."""
    return counted("default")


@needs_glibc
def test_large_results_come_from_memory_that_was_kept(default: dict[str, int]) -> None:
    # By default mapped anew at every call, in pages of at most 2 MiB.
    assert default["torch"] >= 16
    kept = counted("keep")
    assert kept["kept"]
    assert kept["torch"] <= 2
    assert kept["ours"] <= 2


@needs_glibc
@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1000000", False),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000", False),
        ("GLIBC_TUNABLES", "glibc.cpu.x86_shstk=off", True),
    ],
)
def test_whoever_set_the_allocator_has_decided(
    name: str, value: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in [n for n in os.environ if n not in UNDECIDED]:
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    assert keep_memory() is kept
    assert keep_memory(override=True)


@needs_glibc
@pytest.mark.skipif(not PAGES.exists() or "[never]" in PAGES.read_text(), reason="the system gives no large pages")
def test_large_results_of_kernels_come_in_large_pages(default: dict[str, int]) -> None:
    if "[madvise]" in PAGES.read_text():
        assert default["torch"] > 10_000
    assert default["ours"] < 2_000


@needs_glibc
@pytest.mark.skipif(not PAGES.exists() or "[madvise]" not in PAGES.read_text(), reason="no large pages for who asks")
def test_the_heap_that_is_kept_comes_in_large_pages(default: dict[str, int]) -> None:
    # 28 MiB that nobody has touched yet: less than what glibc maps by itself.
    assert default["new"] > 7_000
    assert counted("keep")["new"] < 500
    limited = ["sh", "-c", 'ulimit -v 16000000; exec "$@"', "sh"]
    assert counted("keep", before=limited)["new"] > 7_000  # reserved addresses could be what another part of it lacks


@pytest.mark.parametrize(
    ("pages", "overcommit", "variable", "serve"),
    [
        ("always [madvise] never", "0", "", True),
        ("[always] madvise never", "1", "", True),
        ("always madvise [never]", "0", "", False),
        ("always [madvise] never", "2", "", False),  # where addresses count as memory
        ("always [madvise] never", "0", "MALLOC_PERTURB_", False),  # which writes to all that is asked for
    ],
)
def test_large_pages_are_reserved_where_they_cost_nothing(
    pages: str, overcommit: str, variable: str, serve: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource")
    for name in [n for n in os.environ if n not in UNDECIDED]:
        monkeypatch.delenv(name)
    if variable:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    monkeypatch.setattr(Path, "read_text", lambda path: pages if path.name == "enabled" else f"{overcommit}\n")
    assert memory._large_pages_serve() is serve


def test_every_session_of_benchmarks_keeps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(runner, "keep_memory", lambda *, override: asked.append(override))
    Session("cpu", TINY, allow_noise=True, tiny=True).start()
    assert asked == [True]


def test_training_on_a_cpu_keeps_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(loop, "keep_memory", lambda: asked.append(True))
    train(tiny(images=8), tmp_path / "run")
    assert asked == [True]
