"""What a measurement asks of the machine before it begins."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ditscale.bench import devices
from ditscale.bench.runner import Session
from ditscale.bench.timing import TINY

FAULTS = """
import resource, sys, torch
from ditscale.bench import devices
if sys.argv[1] == "keep" and not devices.keep_memory():
    sys.exit("no mallopt")
def call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(16 << 20).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(call() for _ in range(40)))  # aligned pieces fit again once freed neighbours have joined
"""


def faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True)
    if "no mallopt" in done.stderr:
        pytest.skip("no glibc here")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_large_results_come_from_memory_that_was_kept() -> None:
    # 64 MiB: by default mapped anew at every call, in pages of at most 2 MiB.
    assert faults("default") >= 16
    assert faults("keep") <= 2


def test_every_session_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(devices, "keep_memory", lambda: asked.append(True))
    Session("cpu", TINY, allow_noise=True, tiny=True).start()
    assert asked == [True]
