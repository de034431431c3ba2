"""Entry points for pytest-benchmark: ``pytest bench/ --benchmark-only``. The default suite does not collect this folder.

For a quick look at one operator while working on it, with ``-k``. What is quoted comes from ``ditscale bench``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark")

from ditscale.bench.cases import Case, cases
from ditscale.bench.correctness import judge
from ditscale.bench.operators import operator_subject
from ditscale.errors import BackendUnavailable

_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_CASES = [case for suite in ("adaln", "attention") for case in cases(suite, _DEVICE)]
_PROVIDERS = ("eager", "sdpa", *(("ours-cpu",) if _DEVICE == "cpu" else ("ours-cuda", "ours-triton")))


@pytest.mark.parametrize("provider", _PROVIDERS)
@pytest.mark.parametrize("case", _CASES, ids=lambda case: case.id)
def test_speed(benchmark: Any, case: Case, provider: str) -> None:
    """One candidate of one case, after the same check as everywhere."""
    subject = operator_subject(case, _DEVICE, most_sets=32)
    if provider not in subject.build:
        pytest.skip(f"{case.op} has no {provider}")
    try:
        candidate = subject.build[provider]()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    verdict = judge(candidate.results(), subject.exact(), subject.build[subject.yardstick]().results())
    assert verdict.reason is None, verdict.reason
    place = -1

    def call() -> Any:
        nonlocal place
        place = (place + 1) % subject.sets
        result = candidate.call(place)
        if _DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.group = case.id
    benchmark.extra_info["bytes_moved"] = sum(w.bytes_moved for w in case.work())
    benchmark(call)
