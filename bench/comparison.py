"""Two files of rows: what became slower or faster, beyond the noise of both. No torch.

A machine that is slower today slows everything. So where both files hold a yardstick of the same case that this project does
not write (plain PyTorch, a copy, scipy), times are compared as multiples of it, by the ratios within rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ditscale.bench.rows import Row, measured
from ditscale.errors import InputError

YARDSTICKS = ("eager", "copy", "sdpa", "layer_norm", "scipy", "torch")
VERDICTS = ("slower", "faster", "same")


@dataclass(frozen=True)
class Change:
    """One provider of one case in both files.

    Attributes:
        ratio: time after over time before, as multiples of the yardstick where there is one.
        noise: relative half-width that chance explains: the two spreads and the drift of the machine, added up.
        yardstick: what the times were divided by, or "" for none.
        verdict: one of ``VERDICTS``.
    """

    case: str
    provider: str
    before_ms: float
    after_ms: float
    ratio: float
    noise: float
    yardstick: str
    verdict: str

    def cells(self) -> tuple[str, ...]:
        """For a table."""
        change = f"{100 * (self.ratio - 1):+.1f} %" + (f" of {self.yardstick}" if self.yardstick else "")
        times = (f"{self.before_ms:.4g}", f"{self.after_ms:.4g}")
        return (self.case, self.provider, *times, change, f"{100 * self.noise:.1f} %", self.verdict)


@dataclass(frozen=True)
class Comparison:
    """All changes, the worst first, and what stands in one file only."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    broken: tuple[str, ...]

    @property
    def regressions(self) -> list[str]:
        """Ours that became slower, and ours that ran before and do not now."""
        slower = [
            f"{c.case} {c.provider}" for c in self.changes if c.verdict == "slower" and c.provider.startswith("ours")
        ]
        return slower + list(self.broken)

    def sentence(self) -> str:
        """The outcome in words."""
        count = {v: sum(c.verdict == v for c in self.changes) for v in VERDICTS}
        text = f"{count['slower']} slower, {count['faster']} faster, {count['same']} the same within the noise"
        if self.broken:
            text += f"; ran before and not now: {', '.join(self.broken)}"
        gone, new = len(self.only_before), len(self.only_after)
        return text + (f"; {gone} only before, {new} only after" if gone or new else "")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "changes": [vars(c) for c in self.changes],
            "regressions": self.regressions,
            "only_before": list(self.only_before),
            "only_after": list(self.only_after),
            "broken": list(self.broken),
            "summary": self.sentence(),
        }


def compare_rows(
    before: Iterable[Row], after: Iterable[Row], *, threshold: float = 0.05, any_device: bool = False
) -> Comparison:
    """Match rows by case and provider and judge each pair.

    Args:
        before, after: rows of the two states.
        threshold: smallest relative change that counts, beyond the noise. Default: 0.05.
        any_device: allow files of different devices or numbers of threads. Default: False.

    Raises:
        InputError: the devices differ, or a file holds no times, or the threshold is negative.
    """
    if not threshold >= 0:
        raise InputError(f"--threshold: expected a number of at least 0, got {threshold}")
    before, after = list(before), list(after)
    old, new = _times(before), _times(after)
    for name, rows in (("before", old), ("after", new)):
        if not rows:
            raise InputError(f"{name}: expected rows that hold times, got none")
    if not any_device:
        devices = [
            sorted({(r["device"]["name"], r["device"].get("threads")) for r in rows.values()}) for rows in (old, new)
        ]
        if devices[0] != devices[1]:
            raise InputError(
                f"after: expected rows of {devices[0]}, as before, got {devices[1]}; --any-device compares them"
            )
    changes = [_change(old, new, key, threshold) for key in old if key in new]
    changes.sort(key=lambda c: (VERDICTS.index(c.verdict), -abs(np.log(c.ratio))))
    failed = {(r["case"], r["provider"]) for r in after if r["status"] in ("wrong", "failed", "unavailable")}
    failed_cases = {case for case, provider in failed if provider == "all"}
    broken = [f"{c} {p}" for c, p in old if p.startswith("ours") and ((c, p) in failed or c in failed_cases)]
    return Comparison(
        tuple(changes),
        tuple(f"{c} {p}" for c, p in old if (c, p) not in new),
        tuple(f"{c} {p}" for c, p in new if (c, p) not in old),
        tuple(broken),
    )


def _times(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    return {(r["case"], r["provider"]): r for r in measured(rows) if r["suite"] != "ceiling"}


def _change(
    old: dict[tuple[str, str], Row], new: dict[tuple[str, str], Row], key: tuple[str, str], threshold: float
) -> Change:
    a, b = old[key], new[key]
    yardstick = next((y for y in YARDSTICKS if y in a.get("speedup_over", {}) and y in b.get("speedup_over", {})), "")
    if yardstick:
        r, s = a["speedup_over"][yardstick], b["speedup_over"][yardstick]
        ratio = r["median"] / s["median"]
        noise = sum((x["p80"] - x["p20"]) / 2 / x["median"] for x in (r, s))
    else:
        ratio = b["time_ms"] / a["time_ms"]
        noise = sum((x["time_ms_p80"] - x["time_ms_p20"]) / 2 / x["time_ms"] + (x.get("noise") or 0.0) for x in (a, b))
    beyond = max(threshold, noise)
    verdict = "slower" if ratio > 1 + beyond else "faster" if ratio < 1 / (1 + beyond) else "same"
    return Change(*key, a["time_ms"], b["time_ms"], ratio, noise, yardstick, verdict)
