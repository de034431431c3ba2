"""The guide's figures and its table are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ditscale.dit import DiTConfig
from ditscale.dit import elementwise as ew
from ditscale.dit.flops import CONVENTIONS, compare, count

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "flops.md").read_text(encoding="utf-8")


def table(heading: str) -> dict[str, list[str]]:
    """Rows of the first table after a heading, by their first cell."""
    part = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows[2:]}


def test_elementwise_table() -> None:
    stated: dict[str, int] = {}
    for names, (costs,) in table("Elementwise costs").items():
        separator = ";" if ";" in costs else ","
        parts = [name.strip() for name in names.split(separator)]
        numbers = [int(n) for n in costs.split(";")] if re.fullmatch(r"[\d; ]+", costs) else []
        if numbers:
            stated |= dict(zip(parts, numbers * len(parts) if len(numbers) == 1 else numbers, strict=False))
    known = {**ew.PER_OUTPUT, "sum": ew.PER_INPUT["sum"]}
    checked = {name for name in stated if name in known}
    assert checked >= {
        "add",
        "rsqrt",
        "cos",
        "sigmoid",
        "silu_backward",
        "gelu",
        "gelu_backward",
        "_softmax",
        "lerp",
    }
    assert {name: stated[name] for name in checked} == {name: known[name] for name in checked}
    assert table("Elementwise costs")["LayerNorm; backward"] == ["5 and 4 a row; 10 and 2 a row"]
    assert ew.layer_norm(3, 100, affine=False) == (3 * (500 + 4), 3 * (1000 + 2))
    assert ew.layer_norm(3, 100, affine=True) == (3 * (700 + 4), 3 * (1400 + 2))
    assert ew.rms_norm(3, 100, weighted=False) == (3 * (300 + 3), 3 * (800 + 3))
    assert ew.rms_norm(3, 100, weighted=True) == (3 * (400 + 3), 3 * (1100 + 3))
    assert ew.rotate(10) == (30, 30)


def test_published_rules() -> None:
    stated = {name.strip("`"): cells[:3] for name, cells in table("Published rules").items()}
    assert stated.keys() == CONVENTIONS.keys() - {"matmul", "all"}
    for column, size in enumerate((256, 512, 1024)):
        off = {row.convention: row.off_percent for row in compare(DiTConfig.preset("DiT-XL/2"), size)}
        for name, cells in stated.items():
            assert float(cells[column]) == pytest.approx(off[name], abs=0.0051), (name, size)


def test_dit_xl_2_by_hand() -> None:
    parts = [228_304_355_328, 8_455_716_864, 451_215_360, 9_437_184, 3_244_032, 18_874_368]
    assert all(f"{part:,}" in PAGE for part in parts)
    assert sum(parts) == count(DiTConfig.preset("DiT-XL/2")).forward == 237_242_843_136
