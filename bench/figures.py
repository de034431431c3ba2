"""Rows as figures: for every operator its distance from the roof, and the speed-ups at a glance. SVG, by matplotlib."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditscale.bench.report import best_of_ours, by_device, figure_name, headline, ratio, roofline_name, with_roof
from ditscale.bench.rows import Row, measured
from ditscale.errors import InputError

# Colours that stay apart in the common forms of colour blindness (Okabe and Ito), and a mark for each beside.
_STYLE = {
    "eager": ("#E69F00", "o"),
    "compile": ("#56B4E9", "s"),
    "sdpa": ("#CC79A7", "^"),
    "ours": ("#009E73", "D"),
    "copy": ("#666666", "|"),
}
_OTHER = ("#999999", "x")
_SHORT = {"forward": "fwd", "backward": "bwd", "forward_backward": "fwd+bwd"}


def _style(provider: str) -> tuple[str, str]:
    return _STYLE.get("ours" if provider.startswith("ours") else provider, _OTHER)


def _name(row: Row) -> str:
    sizes = " ".join(f"{k}{v}" for k, v in row.get("shape", {}).items())
    parts = [row["label"], _SHORT.get(row.get("passes", ""), ""), sizes]
    parts += [row["dtype"]] if row.get("dtype") != "float32" else []
    parts += ["in cache"] if row.get("cache") == "resident" and row["suite"] == "adaln" else []
    return " ".join(p for p in parts if p)


def _plots() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Text stays text, and equal rows give equal files.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ditscale", "font.size": 9})
    return plt


def digest(rows: Sequence[Row]) -> str:
    """Of the rows, to be found again in a figure made from them."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def _save(figure: Any, path: Path, rows: Sequence[Row]) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Description": f"rows {digest(rows)}"}
        figure.savefig(path, format="svg", bbox_inches="tight", metadata=about)
    except OSError as error:
        raise InputError(f"{path}: expected a place to write a figure to, got {error.strerror}") from error
    finally:
        _plots().close(figure)
    return path


def draw_all(rows: Sequence[Row], out: str | Path) -> list[Path]:
    """Of each device ``roofline-<op>-<device>.svg`` for every operator that has a roof, and ``speedups-<device>.svg``
    where operators were timed beside PyTorch's.

    Raises:
        InputError: there are no times to draw, or the folder cannot be written.
    """
    rows = [r for r in measured(rows) if r["suite"] != "ceiling"]
    if not rows:
        raise InputError("rows: expected measured rows to draw, got none")
    paths = []
    for device, mine in by_device(rows).items():
        for op in with_roof(mine):
            of_op = [r for r in mine if r["op"] == op and r.get("roof_share")]
            paths.append(_roofline(of_op, op, Path(out) / roofline_name(op, device)))
        if headline(mine):
            paths.append(_speedups(mine, Path(out) / figure_name(device)))
    return paths


def _roofline(rows: Sequence[Row], op: str, path: Path) -> Path:
    plt = _plots()
    cases = list(dict.fromkeys(r["case"] for r in rows))
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.32 * len(cases)))
    for provider in dict.fromkeys(r["provider"] for r in rows):
        mine = [r for r in rows if r["provider"] == provider]
        colour, mark = _style(provider)
        x = [100 * r["roof_share"] for r in mine]
        axes.scatter(
            x,
            [cases.index(r["case"]) for r in mine],
            color=colour,
            marker=mark,
            label=provider,
            s=36,
            zorder=3,
        )
    axes.axvline(100, color="black", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(cases)), [_name(next(r for r in rows if r["case"] == c)) for c in cases])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("% of the roof: compulsory bytes at the measured copy bandwidth beyond the caches, or products at\n"
                    "the measured matrix rate; above 100 % a working set stays in a cache")  # fmt: skip
    axes.set_title(f"{op}: {rows[0]['device']['name']}", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _save(figure, path, rows)


def _speedups(rows: Sequence[Row], path: Path) -> Path:
    plt = _plots()
    found = []
    for providers in headline(rows):
        ours = best_of_ours(providers.values())
        assert ours is not None
        found.append((f"{ours['op']}: {_name(ours)}", ratio(ours, "eager"), ratio(ours, "compile")))
    figure, axes = plt.subplots(figsize=(7.5, 0.9 + 0.36 * max(1, len(found))))
    bars = (("over eager", "eager", -0.2, 1), ("over torch.compile", "compile", 0.2, 2))
    for label, provider, shift, column in bars:
        have = [(number, row[column]) for number, row in enumerate(found) if row[column] is not None]
        places, heights = [n + shift for n, _ in have], [h for _, h in have]
        axes.barh(places, heights, height=0.36, color=_STYLE[provider][0], label=label)
        for place, value in zip(places, heights, strict=True):
            axes.text(value, place, f" {value:.2f}", va="center", fontsize=7)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(found)), [name for name, _, _ in found])
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("how many times faster ours is (1: the same)")
    axes.set_title(rows[0]["device"]["name"], loc="left")
    axes.legend(loc="lower right", frameon=False)
    return _save(figure, path, rows)
