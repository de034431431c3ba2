"""Rows as tables: the one in the README, and the one of every case with those where we lose first. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ditscale.bench.devices import slug
from ditscale.bench.rows import Row, measured
from ditscale.errors import InputError

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
NOT_MEASURED = "GPU speed is not yet measured: none of the committed rows comes from a GPU."
_PASS = {
    "forward": "forward",
    "backward": "backward",
    "forward_backward": "forward + backward",
    "step": "",
    "call": "",
}
_OP = {
    "layernorm_modulate": "LayerNorm + modulate",
    "gate_residual": "gate x branch + residual",
    "gate_residual_layernorm_modulate": "gate + residual + LayerNorm + modulate",
    "bias_gelu": "bias + GELU",
    "qk_norm_rope": "QK norm + RoPE",
    "attention": "attention",
    "linear": "linear layer",
    "dit_block": "DiT block",
    "training_step": "training step",
}
_NO_RIVALS = ("copy", "layer_norm")  # they do less
# Who made products that are not PyTorch's, by the end of a case's name.
_MAKERS = {"/onednn": " by oneDNN", "/cpu": " by ours"}
Table = tuple[list[str], list[list[str]]]


def best_of_ours(rows: Iterable[Row]) -> Row | None:
    """The row of what ``backend="auto"`` takes; where that was not measured, the first of ours."""
    ours = [r for r in rows if r["provider"].startswith("ours")]
    return next((r for r in ours if r.get("auto")), ours[0] if ours else None)


def by_device(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each device, by its :func:`~ditscale.bench.devices.slug`, in the order in which they came."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(slug(row["device"]), []).append(row)
    return found


def by_case(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(device's slug, case) -> provider -> row, of measured rows, in the order in which they came."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in measured(rows):
        if row["suite"] != "ceiling":
            found.setdefault((slug(row["device"]), row["case"]), {})[row["provider"]] = row
    return found


def ratio(ours: Row, other: str) -> float | None:
    """How many times faster than another provider of the same case, the median within rounds."""
    over = ours.get("speedup_over", {}).get(other)
    return None if over is None else float(over["median"])


def lost(providers: dict[str, Row]) -> dict[str, float]:
    """Providers that beat ours beyond the spread, with how fast ours is beside them (below 1). Copies are no rivals."""
    ours = best_of_ours(providers.values())
    if ours is None:
        return {}
    over = ours.get("speedup_over", {})
    found = {name: r["median"] for name, r in over.items() if name not in _NO_RIVALS and r["p80"] < 1.0}
    for name, row in providers.items():  # peers that are no baseline: by medians, beyond both spreads
        rival = name not in over and not name.startswith("ours") and name not in _NO_RIVALS
        if rival and row["time_ms_p80"] < ours["time_ms_p20"]:
            found[name] = row["time_ms"] / ours["time_ms"]
    return found


def table_cells(rows: Iterable[Row]) -> Table:
    """Every measured case as cells, those where we lose first; then what was not measured, with the reason."""
    rows = list(rows)
    head = [
        "case",
        "ours ms",
        "eager ms",
        "compile ms",
        "over eager",
        "over compile",
        "of roof",
        "of copy",
        "faster than us",
    ]
    body = []
    grouped = sorted(by_case(rows).items(), key=lambda item: (not lost(item[1]), item[0][0]))
    for (_, case), providers in grouped:
        ours = best_of_ours(providers.values())
        if ours is None:
            continue
        cells = [case, _ms(ours), *(_ms(providers.get(p)) for p in ("eager", "compile"))]
        cells += [_times(ratio(ours, p)) for p in ("eager", "compile")]
        cells += [_percent(ours.get("roof_share")), _percent(ratio(ours, "copy"))]
        faster = [f"{name} {_times(1 / against)}" for name, against in lost(providers).items()]
        body.append([*cells, ", ".join(faster) or "none"])
    for row in rows:
        if row["status"] not in ("measured", "unavailable"):
            body.append([f"{row['case']} ({row['provider']})", row["status"], str(row["reason"]), *[""] * 6])
    return head, body


def full_table(rows: Iterable[Row]) -> str:
    """Of every device, :func:`table_cells` as Markdown, with the ceilings and what it ran on."""
    parts = []
    for device, mine in by_device(rows).items():
        parts += [_markdown(*table_cells(mine)), *_ceilings(mine), _provenance(mine)]
        parts += [f"![Roofline of {op}](images/{roofline_name(op, device)})" for op in with_roof(mine)]
    return "\n\n".join(part for part in parts if part)


def readme_block(rows: Iterable[Row]) -> str:
    """What stands between the README's markers: a table and a figure of the CPU and of the GPU with the most cases, and a plain
    word where there is none. The other devices stand in :func:`full_table`."""
    rows = list(rows)
    parts = []
    for kind in ("cpu", "cuda"):
        devices = by_device(r for r in rows if r["device"]["type"] == kind).items()
        cases = {device: len(by_case(mine)) for device, mine in devices}
        if any(cases.values()):
            most = max(cases, key=lambda device: cases[device])
            parts.append(_device_block(most, dict(devices)[most]))
    if not parts:
        parts.append("CPU speed is not yet measured: there are no committed rows.")
    if not measured(r for r in rows if r["device"]["type"] == "cuda"):
        parts.append(NOT_MEASURED)
    return "\n\n".join(parts)


def figure_name(device: str) -> str:
    """A device's speed-ups as the README shows them, under ``docs/images``; the device by its slug."""
    return f"speedups-{device}.svg"


def roofline_name(op: str, device: str) -> str:
    """An operator's distance from the roof on a device, under ``docs/images``; the device by its slug."""
    return f"roofline-{op}-{device}.svg"


def with_roof(rows: Iterable[Row]) -> list[str]:
    """Operators of which there is something to draw."""
    return list(dict.fromkeys(r["op"] for r in measured(rows) if r.get("roof_share")))


def headline(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """By provider, the cases that stand in the README: the first of every operator and pass at full precision, every block and
    step; only those that have plain PyTorch beside ours."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for (_, case), providers in by_case(rows).items():
        ours = best_of_ours(providers.values())
        if ours is None or "eager" not in providers or ours["suite"] not in ("adaln", "block", "step", "attention"):
            continue
        one_of_many = ours["suite"] in ("adaln", "attention")
        found.setdefault((ours["op"], ours["passes"], ours["cache"]) if one_of_many else (case,), providers)
    return list(found.values())


def _device_block(device: str, rows: Sequence[Row]) -> str:
    head = ["", "shape", "eager ms", "compile ms", "ours ms", "over eager", "over compile", "of roof"]
    body = []
    for providers in headline(rows):
        ours = best_of_ours(providers.values())
        assert ours is not None
        cells = [_title(ours), _shape(ours), *(_ms(providers.get(p)) for p in ("eager", "compile")), _ms(ours)]
        cells += [_times(ratio(ours, p)) for p in ("eager", "compile")]
        body.append([*cells, _percent(ours.get("roof_share"))])
    losses = [p for p in by_case(rows).values() if lost(p)]
    cases = [p for p in by_case(rows).values() if best_of_ours(p.values()) is not None]
    note = (
        f"{_provenance(rows)} Medians of interleaved rounds, speed-ups the medians of ratios within rounds. "
        f"Of {len(cases)} cases, something else measured faster than ours in {len(losses)}: "
        f"[all cases, those first](docs/benchmarks.md#results)."
    )
    figure = f"![Speed-ups over eager and compiled PyTorch](docs/images/{figure_name(device)})"
    return "\n\n".join([_markdown(head, body), note, figure])


def _provenance(rows: Sequence[Row]) -> str:
    """Device, threads, versions, commits, dates and noise, in one sentence."""
    found = measured(rows)
    if not found:
        return ""
    device = found[0]["device"]
    threads = f", {device['threads']} threads, {device.get('instruction_set')}" if device["type"] == "cpu" else ""
    dates = sorted({r["measured_at"][:10] for r in found})
    noisy = max((r.get("noise") or 0.0 for r in found), default=0.0)
    commits = sorted({str(r["commit"])[:10] + ("+" if r.get("dirty") else "") for r in found})
    torch = ", ".join(sorted({str(r["versions"].get("torch")) for r in found}))
    days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    return (
        f"{device['name']}{threads}, torch {torch}, commit {', '.join(commits)}, {days}; "
        f"the calibration loop spread by at most {100 * noisy:.0f} %."
    )


def _ceilings(rows: Iterable[Row]) -> list[str]:
    """What the device itself did in the same runs, as a sentence."""
    parts = []
    for row in measured(rows, suite="ceiling"):
        if "bytes_per_second" in row:
            size = int(row["case"].split("/")[2]) / 2**20
            parts.append(f"copy of {size:.3g} MiB {row['bytes_per_second'] / 1e9:.0f} GB/s")
        else:
            by = next((text for end, text in _MAKERS.items() if row["case"].endswith(end)), "")
            parts.append(f"{row['dtype']} product{by} {row['flops_per_second'] / 1e9:.0f} GFLOP/s")
    return [f"Ceilings: {', '.join(parts)}."] if parts else []


def _title(row: Row) -> str:
    parts = [_OP.get(row["op"], row["op"]), _PASS.get(row["passes"], row["passes"])]
    if row["cache"] == "resident" and row["suite"] == "adaln":
        parts.append("in cache")
    if row["dtype"] != "float32":
        parts.append(row["dtype"])
    return ", ".join(part for part in parts if part)


def _shape(row: Row) -> str:
    sizes = " ".join(f"{k}={v}" for k, v in row["shape"].items() if k != "C")
    return f"{row['label']}: {sizes}" if row.get("label") else sizes


def insert(path: str | Path, text: str) -> None:
    """Put ``text`` between the markers of a file.

    Raises:
        InputError: the file or its two markers are not there.
    """
    path = Path(path)
    try:
        before = path.read_text()
    except OSError as error:
        raise InputError(f"{path}: expected a file to write the table into, got {error.strerror}") from error
    between(before, str(path))
    pattern = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.S)
    path.write_text(pattern.sub(lambda _: f"{START}\n{text}\n{END}", before, count=1))


def between(text: str, name: str) -> str:
    """What stands between the markers.

    Raises:
        InputError: there is not exactly one pair of them.
    """
    found = re.findall(f"{re.escape(START)}\n?(.*?)\n?{re.escape(END)}", text, re.S)
    if len(found) != 1:
        raise InputError(f"{name}: expected one pair of {START} and {END}, got {len(found)}")
    return str(found[0])


def _ms(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{row['time_ms']:.3g}" if row["time_ms"] < 999.5 else f"{row['time_ms']:,.0f}"  # and no exponent


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _percent(value: Any) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in body)])
