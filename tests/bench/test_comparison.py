"""Two files: verdicts that know the noise, and a machine that is slower today is no regression."""

from __future__ import annotations

import pytest
from bench_rows import case_rows

from ditscale.bench.comparison import compare_rows
from ditscale.errors import InputError

BEFORE = case_rows({"eager": 4.0, "ours-cpu": 1.0}, spread=0.02)


def _verdict(after: list[dict]) -> str:
    return next(c.verdict for c in compare_rows(BEFORE, after).changes if c.provider == "ours-cpu")


def test_slower_faster_same() -> None:
    assert _verdict(case_rows({"eager": 4.0, "ours-cpu": 1.2}, spread=0.02)) == "slower"
    assert _verdict(case_rows({"eager": 4.0, "ours-cpu": 0.8}, spread=0.02)) == "faster"
    assert _verdict(case_rows({"eager": 4.0, "ours-cpu": 1.03}, spread=0.02)) == "same"


def test_the_borders_are_each_others_inverse_and_belong_to_neither_side() -> None:
    assert _verdict(case_rows({"eager": 4.0, "ours-cpu": 0.951}, spread=0.02)) == "faster"  # 1 / 1.0515
    rows = case_rows({"eager": 4.0, "ours-cpu": 1.0})
    ours = next(c for c in compare_rows(rows, rows, threshold=0).changes if c.provider == "ours-cpu")
    assert (ours.noise, ours.verdict) == (0, "same")


def test_a_change_within_the_spread_is_the_same() -> None:
    assert _verdict(case_rows({"eager": 4.0, "ours-cpu": 1.2}, spread=0.3)) == "same"


def test_a_slower_machine_slows_the_yardstick_too() -> None:
    found = compare_rows(BEFORE, case_rows({"eager": 8.0, "ours-cpu": 2.0}, spread=0.02))
    assert [c.verdict for c in found.changes if c.provider == "ours-cpu"] == ["same"]
    assert found.regressions == []


def test_a_slower_peer_is_no_regression_of_ours_but_is_shown() -> None:
    found = compare_rows(BEFORE, case_rows({"eager": 8.0, "ours-cpu": 1.0}, spread=0.02))
    assert any(c.provider == "eager" and c.verdict == "slower" for c in found.changes)
    assert found.regressions == []


def test_regressions_come_first_and_are_listed() -> None:
    found = compare_rows(BEFORE, case_rows({"eager": 4.0, "ours-cpu": 2.0}, spread=0.02))
    assert found.changes[0].provider == "ours-cpu"
    assert len(found.regressions) == 1


def test_what_ran_before_and_is_wrong_now_is_a_regression() -> None:
    after = case_rows({"eager": 4.0, "ours-cpu": 1.0})
    after[1] |= {"status": "wrong", "reason": "dx is off"}
    assert compare_rows(BEFORE, after).regressions == [f"{after[1]['case']} ours-cpu"]


def test_files_of_different_devices_are_refused() -> None:
    other = case_rows({"eager": 4.0, "ours-cpu": 1.0}, device="cuda")
    with pytest.raises(InputError, match="--any-device"):
        compare_rows(BEFORE, other)
    assert compare_rows(BEFORE, other, any_device=True).changes


def test_files_without_times_are_refused() -> None:
    with pytest.raises(InputError, match="after: expected rows that hold times, got none"):
        compare_rows(BEFORE, [])
