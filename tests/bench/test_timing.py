"""The protocol: order of samples, rotation of buffers, statistics, and refusal on a noisy machine. No time is asserted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ditscale.bench import devices, interference, timing
from ditscale.bench.timing import (
    TINY,
    MachineTooNoisy,
    Protocol,
    Sample,
    Timing,
    _rounds,
    calibrate,
    measure,
    relative_spread,
)

# Samples of one call, so that the order of calls is the order of samples.
SINGLE = Protocol(
    rounds=4, least_rounds=4, sample_ms=0.0, warm_up_passes=1, warm_up_ms=0.0, seconds=0.0, refuse=False, attempts=1
)


def test_rounds_interleave_and_take_turns_at_being_first() -> None:
    seen: list[str] = []
    measure({name: lambda _, n=name: seen.append(n) for name in "ABC"}, sets=2, device="cpu", protocol=SINGLE)
    rounds = seen[6:]  # after each candidate's first walk through its two sets
    assert "".join(rounds) == "ABCBCACABABC"


def test_calls_rotate_through_all_sets_and_results_are_kept_until_their_set_returns() -> None:
    alive: list[int] = []

    class Result:
        def __init__(self, place: int) -> None:
            self.place = place
            alive.append(place)

        def __del__(self) -> None:
            alive.remove(self.place)

    places: list[int] = []

    def call(place: int) -> Result:
        places.append(place)
        return Result(place)

    most = 0

    def watched(place: int) -> Result:
        nonlocal most
        result = call(place)
        most = max(most, len(alive))
        return result

    measure({"one": watched}, sets=3, device="cpu", protocol=SINGLE)
    assert places == [0, 1, 2, 0, 1, 2, 0]
    assert most == 4  # three sets' results, and the new one before its predecessor goes


def test_a_resident_case_is_warmed_before_every_sample() -> None:
    calls: list[str] = []
    measure({n: lambda _, n=n: calls.append(n) for n in "AB"}, sets=1, device="cpu", protocol=SINGLE)
    # A's sample follows an untimed call of A, or B's working set would have pushed A's out of the cache.
    assert "".join(calls[2:]) == "AABBBBAAAABBBBAA"


def test_time_limit_ends_rounds_but_not_before_the_least() -> None:
    protocol = replace(SINGLE, rounds=50, least_rounds=3)
    assert len(measure({"x": lambda _: None}, sets=2, device="cpu", protocol=protocol)["x"].samples_ms) == 3


def test_statistics() -> None:
    t = Timing((1.0, 2.0, 3.0, 4.0, 10.0), 1)
    assert t.median_ms == 3.0
    assert t.percentile_ms(20) == pytest.approx(1.8)
    assert relative_spread((9.0, 10.0, 11.0)) == pytest.approx(0.12)


def test_speedup_is_the_median_of_ratios_within_rounds() -> None:
    # The machine slows threefold in the last two rounds: medians of times say 6 / 3 = 2, and so does every round but one.
    ours, other = Timing((1.0, 1.0, 3.0, 3.0, 3.0), 1), Timing((2.0, 2.0, 6.0, 6.0, 3.0), 1)
    over = ours.speedup_over(other)
    assert over["median"] == 2.0
    assert over["p20"] < over["median"] <= over["p80"]
    apart = Timing((1.0,) * 5, 1).speedup_over(Timing((1.0, 2.0, 3.0, 4.0, 5.0), 1))
    assert (apart["p20"], apart["p80"]) == (pytest.approx(1.8), pytest.approx(4.2))


def test_a_sample_is_the_time_of_one_call_and_the_share_of_all_that_was_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([7_000_000.0, 9_000_000.0])
    monkeypatch.setattr(timing, "waited_ns", lambda: next(waited))
    monkeypatch.setattr(timing, "_timed_ns", lambda call, place, calls: 8_000_000.0)
    assert timing._watched(lambda place: None, 4) == Sample(ms=2.0, waited=0.25)


def test_a_noisy_machine_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_calibration_spread", lambda device, protocol: 0.31)
    with pytest.raises(MachineTooNoisy, match=r"spreads by 31 %.*allowed 10 %.*--allow-noise"):
        calibrate("cpu", Protocol(patience_seconds=0.0))


def test_calibration_waits_for_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    spreads = iter([0.5, 0.02])
    monkeypatch.setattr(timing, "_calibration_spread", lambda device, protocol: next(spreads))
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    assert calibrate("cpu", Protocol(patience_seconds=5.0)) == 0.02


def test_the_real_calibration_loop_gives_a_spread() -> None:
    assert calibrate("cpu", TINY) >= 0


def _scripted(waited: list[float]) -> tuple[list[int], Callable[[], Sample]]:
    """A sampler whose nth sample takes n ms, and waited for a core as given (0 when the list is over)."""
    calls: list[int] = []

    def sample() -> Sample:
        calls.append(len(calls))
        return Sample(float(len(calls)), waited[len(calls) - 1] if len(calls) <= len(waited) else 0.0)

    return calls, sample


def test_a_disturbed_sample_is_measured_again() -> None:
    calls, sample = _scripted([0.5, 0.5, 0.0, 0.0, 0.0])
    samples, disturbed = _rounds({"x": sample}, replace(SINGLE, rounds=3, least_rounds=3, attempts=5, refuse=True))
    assert samples == {"x": [3.0, 4.0, 5.0]}
    assert disturbed == pytest.approx(2 / 5)


def test_a_long_sample_bears_what_the_services_of_a_system_take() -> None:
    protocol = Protocol()
    assert protocol.calm(Sample(5.0, 0.01)) and not protocol.calm(Sample(5.0, 0.02))
    assert protocol.calm(Sample(500.0, 0.02)) and not protocol.calm(Sample(500.0, 0.04))


def test_a_round_that_stays_disturbed_is_dropped_for_all_candidates() -> None:
    _, x = _scripted([0.5, 0.5])
    _, y = _scripted([])
    samples, _ = _rounds({"x": x, "y": y}, replace(SINGLE, rounds=2, least_rounds=2, attempts=2, refuse=True))
    assert samples == {"x": [3.0, 4.0], "y": [2.0, 3.0]}


def test_a_machine_that_is_never_ours_is_refused_or_said_to_be_so() -> None:
    protocol = replace(SINGLE, attempts=2, refuse=True)
    with pytest.raises(
        MachineTooNoisy, match=r"disturbed 100 % of the samples and left 0 rounds of \d+ whole.*--allow-noise"
    ):
        _rounds({"x": lambda: Sample(1.0, 0.9)}, replace(protocol, patience_seconds=0.0))
    samples, disturbed = _rounds({"x": lambda: Sample(1.0, 0.9)}, replace(protocol, refuse=False))
    assert (len(samples["x"]), disturbed) == (4, 1.0)


@pytest.mark.skipif(not interference.visible(), reason="this system does not count what threads wait")
def test_waiting_for_a_core_is_seen() -> None:
    def wait_of(process_count: int) -> float:
        """Share of 60 ms of work that this process waited, with others on its core."""
        core = {min(os.sched_getaffinity(0))}
        kept = os.sched_getaffinity(0)
        os.sched_setaffinity(0, core)
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(process_count)]
        try:
            time.sleep(0.3)
            before, end = interference.waited_ns(), time.perf_counter() + 0.06
            while time.perf_counter() < end:
                pass
            return (interference.waited_ns() - before) / 6e7
        finally:
            os.sched_setaffinity(0, kept)
            for other in others:
                other.kill()
                other.wait()

    assert wait_of(3) > 0.2


def test_memory_is_a_containers_where_it_has_less(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    whole = devices._memory(limit)  # no such file
    for text, want in (("1000000\n", 1_000_000), ("max\n", whole), (f"{2 * whole}\n", whole)):
        limit.write_text(text)
        assert devices._memory(limit) == want
