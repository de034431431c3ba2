"""Made-up rows with the fields of real ones, for tests of what is made from rows."""

from __future__ import annotations

from typing import Any

from ditscale.bench.cases import operator_case
from ditscale.bench.timing import Timing


def case_rows(
    times: dict[str, float], *, spread: float = 0.0, device: str = "cpu", B: int = 8, **more: Any
) -> list[dict[str, Any]]:
    """Rows of one case, a row for each provider with its time in ms; ``spread`` widens all samples alike."""
    case = operator_case("layernorm_modulate", "forward", "float32", B, 256, 384, 6, label="DiT-S")
    samples = {p: Timing(tuple(t * (1 + spread * k) for k in (-1, -0.5, 0, 0.5, 1)), 3) for p, t in times.items()}
    rows = []
    for provider, timing in samples.items():
        over = {
            o: timing.speedup_over(samples[o]) for o in ("eager", "compile", "copy") if o in samples and o != provider
        }
        if spread:  # chance differs between providers
            over = {
                o: r | {"p20": r["median"] * (1 - spread), "p80": r["median"] * (1 + spread)} for o, r in over.items()
            }
        rows.append(
            {
                "schema": 1,
                "suite": "adaln",
                "case": case.id,
                "op": case.op,
                "provider": provider,
                "status": "measured",
                "reason": None,
                "device": {"type": device, "name": f"a {device}", "threads": 2},
                "versions": {"torch": "2.13.0"},
                "commit": "0123456789abcdef",
                "dirty": False,
                "measured_at": "2026-01-02T03:04:05+00:00",
                "passes": case.passes,
                "dtype": case.dtype,
                "shape": case.shape,
                "cache": case.cache,
                "label": case.label,
                "auto": provider.startswith("ours"),
                "noise": 0.02,
                "roof_share": 0.5,
                "time_ms": timing.median_ms,
                "time_ms_p20": timing.percentile_ms(20),
                "time_ms_p80": timing.percentile_ms(80),
                "samples": 5,
                "speedup_over": over,
            }
            | more
        )
    return rows
