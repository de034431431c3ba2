"""Runs cases: check, then time, then one row a provider. The only place that knows the order of things."""

from __future__ import annotations

import datetime
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ditscale.bench import ceilings, devices
from ditscale.bench.cases import ADALN_OPS, Case, cases
from ditscale.bench.correctness import FACTOR, PEER_FACTOR, Verdict, judge
from ditscale.bench.rows import SCHEMA, Row
from ditscale.bench.subjects import Candidate, Results, Subject
from ditscale.bench.timing import TINY, MachineTooNoisy, Protocol, Timing, calibrate, measure, measure_host
from ditscale.errors import BackendUnavailable
from ditscale.memory import keep_memory

# What speed-ups are said over, where it was measured.
BASELINES = ("eager", "compile", "copy", "sdpa", "layer_norm", "scipy", "torch")


@dataclass
class Session:
    """One run of the benchmarks on one device.

    Args:
        device: "cpu" or "cuda".
        protocol: how everything is timed.
        allow_noise: measure on a noisy machine too; the rows say how noisy.
        against: if not empty, only these providers, ours uncompiled, and plain PyTorch, which the check needs.
        tiny: the cases of tests and dry runs.
        whole_grid: every model, token count and batch.
        deadline: ``time.monotonic()`` after which cases are skipped.
        say: takes lines for a person.
    """

    device: str
    protocol: Protocol
    allow_noise: bool = False
    against: tuple[str, ...] = ()
    tiny: bool = False
    whole_grid: bool = False
    deadline: float = float("inf")
    say: Callable[[str], None] = print
    roof: ceilings.Roof | None = None
    common: Row = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.allow_noise:
            self.protocol = replace(self.protocol, refuse=False)

    def start(self) -> list[Row]:
        """Have freed memory kept, calibrate and measure the ceilings; returns the ceilings' rows.

        Raises:
            MachineTooNoisy: and noise was not allowed.
        """
        keep_memory(override=True)  # one protocol for all rows
        if self.device == "cpu" and not self.tiny:
            devices.touch_memory()
        spread = calibrate(self.device, self.protocol)
        self.common = {
            "schema": SCHEMA,
            "device": devices.machine(self.device),
            "versions": devices.versions(),
            **devices.commit(),
        }
        found = ceilings.measure_ceilings(self.device, self.protocol, tiny=self.tiny)
        self.roof = ceilings.Roof(found)
        rows = []
        for c in found:
            name = "/".join(str(part) for part in (c["op"], c["dtype"], c["size"], c["where"]) if part)
            unit = "bytes_per_second" if c["op"] == "copy" else "flops_per_second"
            row = self._row("ceiling", name, c["op"], "torch", "measured")
            rows.append(row | {"dtype": c["dtype"], unit: c["value"], "noise": spread, **_times(c["timing"])})
        return rows

    def _row(self, suite: str, case: str, op: str, provider: str, status: str, reason: str | None = None) -> Row:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        head = {
            "suite": suite,
            "case": case,
            "op": op,
            "provider": provider,
            "status": status,
            "reason": reason,
        }
        return head | {"measured_at": now} | self.common

    def wants(self, provider: str, yardstick: str) -> bool:
        """Whether a provider is asked for."""
        if provider in (*self.against, yardstick):
            return True
        if not self.against:
            return provider != "reference"  # plain PyTorch once more
        return provider.startswith("ours") and provider != "ours-compile"

    def providers(self, suite: str) -> list[str]:
        """What the cases of a suite are timed with on this device, beside one another; none for fits and counts."""
        every = cases(suite, self.device, tiny=True) if suite not in ("fit", "flops") else []
        subjects = [_subject(case, self.device, TINY) for case in every]
        return sorted({name for s in subjects for name in (*s.build, *(["copy"] if s.copies else []))})

    def suite(self, name: str, *, only: Sequence[Case] | None = None) -> Iterator[Row]:
        """All rows of a suite, case by case."""
        if name == "fit":
            from ditscale.bench.fits import fit_rows

            yield from fit_rows(self)
            return
        if name == "flops":
            from ditscale.bench.counts import count_rows

            yield from count_rows(self)
            return
        if name == "adaln" and only is None:
            yield from self.host_rows()
        every = cases(name, self.device, tiny=self.tiny, whole_grid=self.whole_grid) if only is None else only
        yield from self._cases(every)

    def _cases(self, queue: Sequence[Case]) -> Iterator[Row]:
        """Case by case; those that other work disturbed once more at the end, and then again."""
        for attempt in range(3):
            disturbed = []
            for case in queue:
                rows = list(self.case(case))
                if rows and rows[-1]["status"] == "noisy" and attempt < 2:
                    disturbed.append(case)
                else:
                    yield from rows
            queue = disturbed

    def host_rows(self) -> Iterator[Row]:
        """What a call costs the host, apart from any work."""
        from ditscale.bench.operators import host_calls

        for op in (*ADALN_OPS, "bias_gelu"):
            timings = measure_host(host_calls(op, self.device), protocol=self.protocol)
            for provider, timing in timings.items():
                yield self.measured_row("host", f"{op}/host", op, provider, timing, timings)

    def case(self, case: Case) -> Iterator[Row]:
        """Check and time one case; a row for every provider, whatever became of it."""
        if self.late:
            yield self.skipped_row(case.suite, case.id, case.op) | _described(case)
            return
        started = time.monotonic()
        try:
            subject = _subject(case, self.device, self.protocol)
            exact = subject.exact()
        except BackendUnavailable as error:
            yield self._case_row(case, "all", "unavailable", str(error))
            return
        except Exception as error:  # one case that cannot be set up must not cost the others
            yield self._case_row(case, "all", "failed", _one_line(error))
            return
        for name in self.against:
            if name not in (*subject.build, "copy"):
                known = ", ".join(n for n in subject.build if not n.startswith("ours"))
                reason = f"--against: expected one of {known}, got {name!r}"
                yield self._case_row(case, name, "unavailable", reason)
        before = devices.state(self.device)
        plain: Results | None = None
        ready: dict[str, Candidate] = {}
        timings: dict[str, Timing] = {}
        verdicts: dict[str, Verdict] = {}
        for name, build in subject.build.items():
            if not self.wants(name, subject.yardstick):
                continue
            made = self._make(case, name, build)
            if isinstance(made, dict):
                yield made
                continue
            candidate, results = made
            plain = results if name == subject.yardstick else plain
            if plain is None:
                yield self._case_row(
                    case, "all", "failed", f"{subject.yardstick} does not run, and all is judged by it"
                )
                return
            # Of our model compiled, most arithmetic is the compiler's.
            held = name.startswith("ours") and not name.endswith("compile")
            verdicts[name] = judge(results, exact, plain, FACTOR if held else PEER_FACTOR)
            del results, made
            if verdicts[name].reason:
                yield self._case_row(case, name, "wrong", verdicts[name].reason) | _errors(verdicts[name])
                continue
            ready[name] = candidate
            if subject.apart:
                timings |= self._measure(subject, {name: candidate.call})
                ready[name] = replace(candidate, call=_dropped, results=_dropped)
                del candidate
                _free(self.device)
        plain = None
        exact.clear()
        try:
            # A case that finds no quiet comes back at the end of its suite, so it need not wait long.
            patience = min(10.0, self.protocol.patience_seconds)
            noise = calibrate(self.device, replace(self.protocol, patience_seconds=patience))
            if not subject.apart:
                calls = {name: candidate.call for name, candidate in ready.items()}
                if subject.copies:
                    total = sum(w.bytes_moved for w in case.work())
                    calls["copy"] = ceilings.copy_call(total, subject.sets, self.device)
                timings = self._measure(subject, calls)
        except MachineTooNoisy as error:
            yield self._case_row(case, "all", "noisy", str(error))
            return
        except Exception as error:  # no memory left for the copies or captures, say
            yield self._case_row(case, "all", "failed", _one_line(error))
            return
        common: Row = {
            **_described(case),
            "sets": subject.sets,
            "interleaved": not subject.apart,
            "noise": noise,
            "state": {"before": before, "after": devices.state(self.device)},
            "case_seconds": round(time.monotonic() - started, 1),
        }
        for name, timing in timings.items():
            row = self.measured_row(case.suite, case.id, case.op, name, timing, timings) | common
            row |= self._against_roof(case, timing, timings.get("copy"))
            if name in ready:
                row |= {"auto": ready[name].auto, "note": ready[name].note or None, **_errors(verdicts[name])}
            yield row

    def _make(self, case: Case, name: str, build: Callable[[], Candidate]) -> tuple[Candidate, Results] | Row:
        """A candidate with its results, or the row that says why there is none."""
        try:
            candidate = build()
            results = candidate.results()
            candidate.call(0)  # what cannot be called must not fail in the midst of the others' rounds
        except BackendUnavailable as error:
            return self._case_row(case, name, "unavailable", str(error))
        except Exception as error:  # whatever a peer or a compiler throws belongs in its row, not in the way of others
            return self._case_row(case, name, "failed", _one_line(error))
        return candidate, results

    def _measure(self, subject: Subject, calls: dict[str, Callable[[int], Any]]) -> dict[str, Timing]:
        return measure(calls, sets=subject.sets, device=self.device, protocol=self.protocol, graphs=subject.graphs)

    def _against_roof(self, case: Case, timing: Timing, copy: Timing | None) -> Row:
        work = case.work()
        if not work or self.roof is None:
            return {}
        bytes_moved, flops = sum(w.bytes_moved for w in work), sum(w.matmul_flops or w.flops for w in work)
        copied = bytes_moved / copy.median_ms * 1e3 if copy is not None else 0.0
        roof_ms, bound = self.roof.ms(work, case.dtype, copied=copied)
        if case.cache == "resident" and copy is not None:
            # How fast a cache is depends on how much of it is used: the copy of as many bytes beside it is its roof.
            roof_ms, bound = copy.median_ms, "memory"
        seconds = timing.median_ms / 1e3
        row: Row = {
            "bytes_moved": bytes_moved,
            "flops": flops,
            "bandwidth_gbps": bytes_moved / seconds / 1e9,
            "flops_per_second": flops / seconds,
            "roof_ms": roof_ms,
            "roof_bound": bound,
            "roof_share": roof_ms / timing.median_ms,
        }
        if case.suite == "step":
            row |= {"images_per_second": case.shape["B"] / seconds} | self._mfu(case, seconds)
        return row

    def _mfu(self, case: Case, seconds: float) -> Row:
        """Training FLOPs by the ledger (convention matmul) over the published peak; on a CPU over the measured one."""
        from ditscale.bench.cases import model_config
        from ditscale.dit.flops import count
        from ditscale.peaks import find_peak

        train = count(model_config(case), batch=case.shape["B"]).train
        published = find_peak(self.common["device"]["name"], case.dtype) if self.device == "cuda" else None
        assert self.roof is not None
        peak: float
        if published is not None and case.dtype != "float32":  # whether float32 runs as tf32 is a setting
            peak, source = published.flops, published.source
        else:
            peak, source = self.roof.flop_rate[case.dtype], "measured matrix product of the same run"
        return {
            "train_flops": train,
            "mfu": train / seconds / peak,
            "mfu_peak": peak,
            "mfu_peak_source": source,
        }

    def measured_row(
        self, suite: str, case: str, op: str, provider: str, timing: Timing, timings: dict[str, Timing]
    ) -> Row:
        """A row with a time and its ratios to the baselines of the same rounds."""
        over = {name: timing.speedup_over(timings[name]) for name in BASELINES if name in timings and name != provider}
        return self._row(suite, case, op, provider, "measured") | _times(timing) | {"speedup_over": over}

    @property
    def late(self) -> bool:
        """Whether the time is up: nothing is begun any more."""
        return time.monotonic() > self.deadline

    def skipped_row(self, suite: str, case: str, op: str, provider: str = "all") -> Row:
        """A row of what was not begun because the time was up."""
        return self._row(suite, case, op, provider, "skipped", "the time was up")

    def unavailable_row(self, suite: str, case: str, op: str, provider: str, reason: str) -> Row:
        """A row of what could not be timed here."""
        return self._row(suite, case, op, provider, "unavailable", reason)

    def _case_row(self, case: Case, provider: str, status: str, reason: str | None) -> Row:
        return self._row(case.suite, case.id, case.op, provider, status, reason) | _described(case)


def _described(case: Case) -> Row:
    return {
        "passes": case.passes,
        "dtype": case.dtype,
        "shape": case.shape,
        "cache": case.cache,
        "label": case.label,
    }


def _subject(case: Case, device: str, protocol: Protocol) -> Subject:
    if case.op == "dit_block":
        from ditscale.bench.models import block_subject

        return block_subject(case, device)
    if case.suite == "step":
        from ditscale.bench.models import step_subject

        return step_subject(case, device)
    from ditscale.bench.operators import operator_subject

    return operator_subject(case, device, protocol.most_sets)


def _dropped(*_: Any) -> Any:
    raise RuntimeError("this candidate has been timed and dropped")


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _times(timing: Timing) -> Row:
    return {
        "time_ms": timing.median_ms,
        "time_ms_p20": timing.percentile_ms(20),
        "time_ms_p80": timing.percentile_ms(80),
        "samples": len(timing.samples_ms),
        "calls_per_sample": timing.calls_per_sample,
        "timer": timing.timer,
        "disturbed": round(timing.disturbed, 3),
    }


def _errors(verdict: Verdict) -> Row:
    return {"error": verdict.error, "plain_error": verdict.plain_error}


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
