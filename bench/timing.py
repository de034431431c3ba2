"""The one protocol by which anything here is timed. Said in words in ``docs/benchmarks.md``.

Candidates are interleaved: in every round each is timed once, in an order that moves on by one from round to round, so that a
slow second of the machine falls on all of them. A sample during which other work took a core is measured again, and a round that
stays disturbed is dropped. Speed-ups are medians of the ratios within rounds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ditscale.bench.interference import waited_ns
from ditscale.errors import InputError

Call = Callable[[int], Any]


class MachineTooNoisy(InputError):
    """Times would mean nothing here now; says why, how much and what the limit is."""


@dataclass(frozen=True)
class Protocol:
    """How long and how often.

    Args:
        rounds: samples of each candidate, as many as ``seconds`` allows but at least ``least_rounds``.
        sample_ms: a sample is as many calls as fill this time.
        warm_up_passes: times that each candidate goes through its buffer sets before the first round, untimed.
        warm_up_ms: and calls for at least as long.
        seconds: time for all rounds of a case.
        waited_limit: share of a sample that the process's threads may have waited for a core; above, it is disturbed.
        waited_limit_long: the same for samples of 100 ms and more, whole training steps: a system's own services take a per
            cent or two of any such stretch, from every candidate alike.
        attempts: times that a disturbed sample is measured again within its round.
        noise_limit: largest (p80 - p20) / median of the calibration loop.
        patience_seconds: how long to wait for a quiet machine before giving up.
        most_sets: buffer sets of a rotating case, at most.
        refuse: give no times where the limits are passed. False: give what there is, with its noise.
    """

    rounds: int = 60
    least_rounds: int = 7
    sample_ms: float = 4.0
    warm_up_passes: int = 6
    warm_up_ms: float = 30.0
    seconds: float = 5.0
    waited_limit: float = 0.01
    waited_limit_long: float = 0.03
    attempts: int = 6
    noise_limit: float = 0.10
    patience_seconds: float = 20.0
    most_sets: int = 512
    refuse: bool = True

    def calm(self, sample: Sample) -> bool:
        """Whether no other work disturbed ``sample``. A sample that long is one call, so its ``ms`` is the length of it."""
        return sample.waited <= (self.waited_limit_long if sample.ms >= _LONG_MS else self.waited_limit)


_LONG_MS = 100.0
_WARM_UP_SECONDS = 1.0  # of a candidate, at most, once it has been through its sets
# Runs every line in milliseconds; its times mean nothing.
TINY = Protocol(
    rounds=2, least_rounds=2, sample_ms=0.0, warm_up_passes=1, warm_up_ms=0.0, seconds=0.0, attempts=1, patience_seconds=0.0,
    most_sets=2, refuse=False,
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Samples of one candidate.

    Attributes:
        samples_ms: milliseconds of one call, one number a round.
        calls_per_sample: calls behind each number.
        timer: "perf_counter", "cuda graph" or "cuda events".
        disturbed: share of all samples of the measurement that other work had disturbed, and that are not among these.
    """

    samples_ms: tuple[float, ...]
    calls_per_sample: int
    timer: str = "perf_counter"
    disturbed: float = 0.0

    @property
    def median_ms(self) -> float:
        """The figure that is quoted."""
        return float(np.median(self.samples_ms))

    def percentile_ms(self, p: float) -> float:
        """Percentile of the samples."""
        return float(np.percentile(self.samples_ms, p))

    def speedup_over(self, other: Timing) -> dict[str, float]:
        """How many times faster than ``other``: median, p20 and p80 of the ratios within rounds."""
        rounds = min(len(other.samples_ms), len(self.samples_ms))  # they differ where candidates were timed apart
        ratios = np.divide(other.samples_ms[:rounds], self.samples_ms[:rounds])
        p20, median, p80 = np.percentile(ratios, [20, 50, 80])
        return {"median": float(median), "p20": float(p20), "p80": float(p80)}


class Sample(NamedTuple):
    """One number, and the share of its time that our threads waited for a core."""

    ms: float
    waited: float


def relative_spread(samples: Sequence[float]) -> float:
    """(p80 - p20) / median."""
    p20, median, p80 = np.percentile(samples, [20, 50, 80])
    return float((p80 - p20) / median)


def calibrate(device: str, protocol: Protocol) -> float:
    """Relative spread of a fixed piece of work on all threads; waits for a quiet machine as long as the protocol says.

    Raises:
        MachineTooNoisy: the spread stayed above ``protocol.noise_limit``.
    """
    deadline = time.monotonic() + protocol.patience_seconds
    while True:
        spread = _calibration_spread(device, protocol)
        if spread <= protocol.noise_limit or not protocol.refuse:
            return spread
        if time.monotonic() >= deadline:
            raise MachineTooNoisy(
                f"this machine is too noisy to time on: a fixed piece of work spreads by {100 * spread:.0f} % "
                f"(20th to 80th percentile), allowed {100 * protocol.noise_limit:.0f} %; {_ADVICE}"
            )
        time.sleep(1.0)


_ADVICE = "stop what else runs, or give --allow-noise to measure all the same and have every row say so"


def _calibration_spread(device: str, protocol: Protocol) -> float:
    """About 3 ms of arithmetic in the caches, 40 times. Both threads meet at every operation, so a core that is taken away
    shows; samples that are known to be disturbed are made again, as in a measurement."""
    samples = 40 if protocol.rounds > 5 else 5
    x = torch.full((1 << 17,), 0.5, device=device)

    def work(_: int) -> None:
        for _ in range(20):
            torch.add(x, 1e-6, out=x)

    work(0)
    if device == "cuda":
        graph = _capture(work, 1)
        _replay_ms(graph, 200, None)
        return relative_spread([_replay_ms(graph, 5, None) for _ in range(samples)])
    calls = max(1, round(3e6 / max(1, _timed_ns(work, 0, 1))))
    return relative_spread([_calmest(lambda: _watched(work, calls), protocol)[0].ms for _ in range(samples)])


def measure(
    candidates: dict[str, Call], *, sets: int, device: str, protocol: Protocol, graphs: bool = True
) -> dict[str, Timing]:
    """Time every candidate, interleaved.

    Args:
        candidates: by name, functions of the number of the buffer set that they work on. What they return is kept until
            the same set comes again, so that results rotate through memory as inputs do.
        sets: buffer sets; 1 for a working set that stays where the call before left it.
        device: "cpu" or "cuda".
        protocol: how long and how often.
        graphs: on a GPU, capture the calls; False for what is used uncaptured, such as a training step. Default: True.

    Returns:
        Timings by name, all of the same rounds.

    Raises:
        MachineTooNoisy: other work disturbed nearly every round.
    """
    if device == "cuda":
        return _measure_cuda(candidates, sets, protocol, graphs)
    runs = {name: _CpuRun(call, sets, protocol) for name, call in candidates.items()}
    samples, disturbed = _rounds({name: run.sample for name, run in runs.items()}, protocol)
    return {name: Timing(tuple(samples[name]), run.calls, disturbed=disturbed) for name, run in runs.items()}


def _rounds(samplers: dict[str, Callable[[], Sample]], protocol: Protocol) -> tuple[dict[str, list[float]], float]:
    """Samples by name, of the rounds in which none was disturbed; and the share of samples that were."""
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    kept = dropped = taken = bad = 0
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    started = time.perf_counter()
    try:
        while kept < protocol.rounds:
            seconds = time.perf_counter() - started
            if kept >= protocol.least_rounds and seconds > protocol.seconds:
                break
            if dropped and seconds > 4 * protocol.seconds + protocol.patience_seconds / 4:
                break
            first = (kept + dropped) % len(names)
            found = {}
            for name in names[first:] + names[:first]:
                found[name], tries = _calmest(samplers[name], protocol)
                calm = protocol.calm(found[name])
                taken, bad = taken + tries, bad + tries - calm
            if protocol.refuse and not all(map(protocol.calm, found.values())):
                dropped += 1
                continue
            kept += 1
            for name, sample in found.items():
                samples[name].append(sample.ms)
    finally:
        if was_enabled:
            gc.enable()
    if kept < min(protocol.least_rounds, protocol.rounds):
        raise MachineTooNoisy(
            f"other work on this machine disturbed {100 * bad / taken:.0f} % of the samples and left {kept} rounds of "
            f"{kept + dropped} whole, expected {protocol.least_rounds}; {_ADVICE}"
        )
    return samples, bad / taken


def _calmest(sampler: Callable[[], Sample], protocol: Protocol) -> tuple[Sample, int]:
    """The first undisturbed sample, or the least disturbed of all attempts; and how many were made."""
    best = sampler()
    tries = 1
    while not protocol.calm(best) and tries < protocol.attempts:
        best = min(best, sampler(), key=lambda sample: sample.waited)
        tries += 1
    return best, tries


class _CpuRun:
    """One candidate on the CPU: its place in the ring of buffer sets, and how many calls make a sample."""

    def __init__(self, call: Call, sets: int, protocol: Protocol) -> None:
        self.call, self.sets = call, sets
        self.ring: list[Any] = [None] * sets
        self.place = 0
        # Through all sets first, until the C library keeps what is freed for the next call: then no sample pays for pages that
        # come from the system.
        started = time.perf_counter()
        once = float("inf")
        for _ in range(protocol.warm_up_passes):
            once = min(once, self._run(sets) / sets)
            if time.perf_counter() - started > _WARM_UP_SECONDS:
                break
        while (time.perf_counter() - started) * 1e3 < protocol.warm_up_ms:
            once = min(once, self._run(1))
        self.calls = max(1, min(10_000, round(protocol.sample_ms * 1e6 / max(1.0, once))))

    def sample(self) -> Sample:
        if self.sets == 1:
            self._run(1)  # untimed: brings the working set back into the caches after the other candidates
        before = waited_ns()
        elapsed = self._run(self.calls)
        return Sample(elapsed / self.calls / 1e6, (waited_ns() - before) / max(1.0, elapsed))

    def _run(self, calls: int) -> float:
        """Nanoseconds of ``calls`` calls over successive sets."""
        call, ring, sets, place = self.call, self.ring, self.sets, self.place
        started = time.perf_counter_ns()
        for _ in range(calls):
            ring[place] = call(place)
            place = place + 1 if place + 1 < sets else 0
        elapsed = time.perf_counter_ns() - started
        self.place = place
        return float(elapsed)


def _timed_ns(call: Call, place: int, calls: int) -> float:
    started = time.perf_counter_ns()
    for _ in range(calls):
        call(place)
    return float(time.perf_counter_ns() - started)


def _watched(call: Call, calls: int) -> Sample:
    """Milliseconds of one of ``calls`` calls on set 0."""
    before = waited_ns()
    elapsed = _timed_ns(call, 0, calls)
    return Sample(elapsed / calls / 1e6, (waited_ns() - before) / max(1.0, elapsed))


def measure_host(calls: dict[str, Callable[[], Any]], *, protocol: Protocol) -> dict[str, Timing]:
    """Host time per call, interleaved, of calls whose work is nothing, so that only dispatch is left; in milliseconds, as
    everywhere. On a GPU the calls are enqueued and not waited for; the queue is emptied between samples."""
    number = 200 if protocol.sample_ms else 3

    def sampler(call: Callable[[], Any]) -> Callable[[], Sample]:
        def sample() -> Sample:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return _watched(lambda _: call(), number)

        for _ in range(20):
            call()
        return sample

    samples, disturbed = _rounds({name: sampler(call) for name, call in calls.items()}, protocol)
    return {name: Timing(tuple(samples[name]), number, disturbed=disturbed) for name in calls}


def _measure_cuda(candidates: dict[str, Call], sets: int, protocol: Protocol, graphs: bool) -> dict[str, Timing]:
    """Graphs that call each set in turn, replayed after a flush of the L2; eager calls between events where that is asked for or
    a candidate cannot be captured (then host time can be in the figure, and the row says so)."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # sets == 1 asks for a warm L2.
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda") if sets > 1 else None
    samplers: dict[str, Callable[[], Sample]] = {}
    calls: dict[str, int] = {}
    timers: dict[str, str] = {}
    for name, call in candidates.items():
        work: _Graph | _Eager = _Eager(call, sets)
        timers[name] = "cuda events"
        if graphs:
            try:
                work = _capture(call, sets)
                timers[name] = "cuda graph"
            except RuntimeError:
                torch.cuda.synchronize()
        _replay_ms(work, 1, flush)  # a graph's first replay brings it to the device
        once = max(1e-6, _replay_ms(work, 1, flush))
        # Clocks and caches settle before anything counts.
        _replay_ms(work, max(1, min(1000, round(protocol.warm_up_ms / once))), flush)
        replays = max(1, min(1000, round(protocol.sample_ms / once)))
        calls[name] = replays * sets
        samplers[name] = lambda work=work, n=replays: Sample(_replay_ms(work, n, flush) / (n * sets), 0.0)  # type: ignore[misc]
    samples, _ = _rounds(samplers, protocol)
    return {name: Timing(tuple(samples[name]), calls[name], timers[name]) for name in candidates}


class _Graph:
    """A captured graph, and the results that its calls wrote to, which live as long as it."""

    def __init__(self, graph: torch.cuda.CUDAGraph, kept: list[Any]) -> None:
        self.replay, self.kept = graph.replay, kept


class _Eager:
    """The calls of a graph without one."""

    def __init__(self, call: Call, sets: int) -> None:
        self.call, self.sets = call, sets
        self.ring: list[Any] = [None] * sets

    def replay(self) -> None:
        for place in range(self.sets):
            self.ring[place] = self.call(place)


def _capture(call: Call, sets: int) -> _Graph:
    """A CUDA graph of one call of each set, its results kept so that each has memory of its own."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(0)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = [call(place) for place in range(sets)]
    torch.cuda.synchronize()
    return _Graph(graph, kept)


def _replay_ms(work: _Graph | _Eager, replays: int, flush: torch.Tensor | None) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush is not None:
        flush.zero_()  # also gives the host time to enqueue what is timed, so no launch gap is in it
    start.record()
    for _ in range(replays):
        work.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
