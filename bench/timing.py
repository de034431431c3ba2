"""The one protocol by which anything here is timed. Said in words in ``docs/benchmarks.md``.

Candidates are interleaved: in every round each is timed once, in an order that moves on by one from round to round, so that a
slow second of the machine falls on all of them. Speed-ups are medians of the ratios within rounds.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ditscale.errors import InputError

Call = Callable[[int], Any]


class MachineTooNoisy(InputError):
    """The calibration loop spread too much for times to mean anything; says how much and what the limit is."""


@dataclass(frozen=True)
class Protocol:
    """How long and how often.

    Args:
        rounds: samples of each candidate, as many as ``seconds`` allows but at least ``least_rounds``.
        sample_ms: a sample is as many calls as fill this time.
        warm_up_ms: untimed calls of each candidate before the first round.
        seconds: time for all rounds of a case.
        noise_limit: largest (p80 - p20) / median of the calibration loop.
        patience_seconds: how long to wait for a quiet machine before giving up.
        most_sets: buffer sets of a rotating case, at most.
    """

    rounds: int = 40
    least_rounds: int = 7
    sample_ms: float = 8.0
    warm_up_ms: float = 30.0
    seconds: float = 5.0
    noise_limit: float = 0.10
    patience_seconds: float = 20.0
    most_sets: int = 512


# Runs every line in milliseconds; its times mean nothing.
TINY = Protocol(2, 2, sample_ms=0.0, warm_up_ms=0.0, seconds=0.0, noise_limit=1e9, patience_seconds=0.0, most_sets=2)


@dataclass(frozen=True)
class Timing:
    """Samples of one candidate.

    Attributes:
        samples_ms: milliseconds of one call, one number a round.
        calls_per_sample: calls behind each number.
        timer: "perf_counter", "cuda graph" or "cuda events".
    """

    samples_ms: tuple[float, ...]
    calls_per_sample: int
    timer: str = "perf_counter"

    @property
    def median_ms(self) -> float:
        """The figure that is quoted."""
        return float(np.median(self.samples_ms))

    def percentile_ms(self, p: float) -> float:
        """Percentile of the samples."""
        return float(np.percentile(self.samples_ms, p))

    @property
    def spread(self) -> float:
        """(p80 - p20) / median."""
        return relative_spread(self.samples_ms)

    def speedup_over(self, other: Timing) -> dict[str, float]:
        """How many times faster than ``other``: median, p20 and p80 of the ratios within rounds."""
        ratios = np.divide(other.samples_ms, self.samples_ms)
        p20, median, p80 = np.percentile(ratios, [20, 50, 80])
        return {"median": float(median), "p20": float(p20), "p80": float(p80)}


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
        spread = _calibration_spread(device, samples=60 if protocol.rounds > 5 else 5)
        if spread <= protocol.noise_limit:
            return spread
        if time.monotonic() >= deadline:
            raise MachineTooNoisy(
                f"this machine is too noisy to time on: a fixed piece of work spreads by {100 * spread:.0f} % "
                f"(20th to 80th percentile), allowed {100 * protocol.noise_limit:.0f} %; stop what else runs, or give "
                f"--allow-noise to measure all the same and have every row say so"
            )
        time.sleep(1.0)


def _calibration_spread(device: str, samples: int) -> float:
    """About 4 ms of arithmetic in the caches, ``samples`` times. Both threads meet at every operation, so a core that is
    taken away shows."""
    x = torch.full((1 << 17,), 0.5, device=device)

    def work(_: int) -> None:
        for _ in range(20):
            torch.add(x, 1e-6, out=x)

    work(0)
    if device == "cuda":
        graph = _capture(work, 1)
        return relative_spread([_replay_ms(graph, 5, None) for _ in range(samples)])
    calls = max(1, round(4e6 / max(1, _timed_ns(work, 0, 1))))
    return relative_spread([_timed_ns(work, 0, calls) for _ in range(samples)])


def measure(candidates: dict[str, Call], *, sets: int, device: str, protocol: Protocol) -> dict[str, Timing]:
    """Time every candidate, interleaved.

    Args:
        candidates: by name, functions of the number of the buffer set that they work on. What they return is kept until
            the same set comes again, so that results rotate through memory as inputs do.
        sets: buffer sets; 1 for a working set that stays where the call before left it.
        device: "cpu" or "cuda".
        protocol: how long and how often.

    Returns:
        Timings by name, all of the same number of rounds.
    """
    if device == "cuda":
        return _measure_cuda(candidates, sets, protocol)
    runs = {name: _CpuRun(call, sets, protocol) for name, call in candidates.items()}
    samples = _rounds({name: run.sample_ms for name, run in runs.items()}, protocol)
    return {name: Timing(tuple(samples[name]), run.calls) for name, run in runs.items()}


def _rounds(samplers: dict[str, Callable[[], float]], protocol: Protocol) -> dict[str, list[float]]:
    names = list(samplers)
    samples: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + protocol.seconds
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(protocol.rounds):
            if number >= protocol.least_rounds and time.perf_counter() > deadline:
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(samplers[name]())
    finally:
        if was_enabled:
            gc.enable()
    return samples


class _CpuRun:
    """One candidate on the CPU: its place in the ring of buffer sets, and how many calls make a sample."""

    def __init__(self, call: Call, sets: int, protocol: Protocol) -> None:
        self.call, self.sets = call, sets
        self.ring: list[Any] = [None] * sets
        self.place = 0
        # Once through all sets first: what they return finds its memory, and no sample pays for first touches.
        once = self._run(sets) / sets
        started = time.perf_counter()
        while (time.perf_counter() - started) * 1e3 < protocol.warm_up_ms:
            once = min(once, self._run(1))
        self.calls = max(1, min(10_000, round(protocol.sample_ms * 1e6 / max(1.0, once))))

    def sample_ms(self) -> float:
        if self.sets == 1:
            self._run(1)  # untimed: brings the working set back into the caches after the other candidates
        return self._run(self.calls) / self.calls / 1e6

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


def host_us(call: Callable[[], Any], *, protocol: Protocol) -> Callable[[], float]:
    """A sampler of the host's microseconds a call: for calls whose work is nothing, so that only dispatch is left.

    On a GPU the calls are enqueued and not waited for; the queue is emptied between samples.
    """
    on_gpu = torch.cuda.is_available()
    for _ in range(20):
        call()
    calls = 200 if protocol.sample_ms else 3

    def sample() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return _timed_ns(lambda _: call(), 0, calls) / calls / 1e3

    return sample


def measure_host(calls: dict[str, Callable[[], Any]], *, protocol: Protocol) -> dict[str, Timing]:
    """Host time per call of every candidate, interleaved; the samples are in milliseconds, as everywhere."""
    samplers = {name: host_us(call, protocol=protocol) for name, call in calls.items()}
    samples = _rounds(samplers, protocol)
    return {name: Timing(tuple(us / 1e3 for us in samples[name]), 200) for name in calls}


def _measure_cuda(candidates: dict[str, Call], sets: int, protocol: Protocol) -> dict[str, Timing]:
    """Graphs that call each set in turn, replayed after a flush of the L2; eager calls between events where a candidate
    cannot be captured (then host time can be in the figure, and the row says so)."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # sets == 1 asks for a warm L2.
    flush = torch.empty(2 * properties.L2_cache_size, dtype=torch.uint8, device="cuda") if sets > 1 else None
    samplers: dict[str, Callable[[], float]] = {}
    calls: dict[str, int] = {}
    timers: dict[str, str] = {}
    for name, call in candidates.items():
        try:
            graph = _capture(call, sets)
            timers[name] = "cuda graph"
        except RuntimeError:
            torch.cuda.synchronize()
            graph = _Eager(call, sets)
            timers[name] = "cuda events"
        once = max(1e-6, _replay_ms(graph, 1, flush))
        replays = max(1, min(1000, round(protocol.sample_ms / once)))
        calls[name] = replays * sets
        samplers[name] = lambda graph=graph, n=replays: _replay_ms(graph, n, flush) / (n * sets)  # type: ignore[misc]
    samples = _rounds(samplers, protocol)
    return {name: Timing(tuple(samples[name]), calls[name], timers[name]) for name in candidates}


class _Eager:
    """The calls of a graph without one."""

    def __init__(self, call: Call, sets: int) -> None:
        self.call, self.sets = call, sets
        self.ring: list[Any] = [None] * sets

    def replay(self) -> None:
        for place in range(self.sets):
            self.ring[place] = self.call(place)


def _capture(call: Call, sets: int) -> Any:
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
    graph.kept = kept
    torch.cuda.synchronize()
    return graph


def _replay_ms(graph: Any, replays: int, flush: torch.Tensor | None) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    if flush is not None:
        flush.zero_()  # also gives the host time to enqueue what is timed, so no launch gap is in it
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
