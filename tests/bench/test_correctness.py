"""A candidate that is wrong is not timed: what the check lets through and what it does not."""

from __future__ import annotations

import torch

from ditscale.bench.correctness import PEER_FACTOR, judge

EXACT = {"y": torch.linspace(-1, 1, 101, dtype=torch.float64)}
PLAIN = {"y": EXACT["y"].float()}


def _off(by: float) -> dict[str, torch.Tensor]:
    return {"y": (EXACT["y"] + by).float()}


def test_equal_results_pass() -> None:
    assert judge(PLAIN, EXACT, PLAIN).reason is None


def test_an_error_beyond_twice_that_of_pytorch_fails_and_is_named() -> None:
    assert "y: largest error" in str(judge(_off(1e-5), EXACT, PLAIN).reason)


def test_twice_the_error_of_pytorch_passes_and_three_times_does_not() -> None:
    assert judge(_off(1.9e-5), EXACT, _off(1e-5)).reason is None
    assert judge(_off(3e-5), EXACT, _off(1e-5)).reason is not None


def test_many_small_errors_fail_by_their_mean_square() -> None:
    plain = {"y": PLAIN["y"].clone()}
    plain["y"][0] += 1e-4  # one outlier of PyTorch's would allow 2e-4 anywhere
    assert "r.m.s." in str(judge(_off(1e-4), EXACT, plain).reason)


def test_nan_missing_and_misshapen_results_fail() -> None:
    assert judge({"y": torch.full((101,), float("nan"))}, EXACT, PLAIN).reason is not None
    assert judge({"z": PLAIN["y"]}, EXACT, PLAIN).reason is not None
    assert judge({"y": PLAIN["y"][:5]}, EXACT, PLAIN).reason is not None


def test_a_peer_is_timed_though_less_exact_and_refused_where_it_gives_another_thing() -> None:
    plain = _off(1e-5)
    assert judge(_off(5e-4), EXACT, plain, PEER_FACTOR).reason is None
    assert judge(_off(1e-2), EXACT, plain, PEER_FACTOR).reason is not None
