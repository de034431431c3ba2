"""Tables and figures from rows: losses first, no claim without a row, the README's block as generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from bench_rows import case_rows

from ditscale.bench.figures import digest, draw_all
from ditscale.bench.report import (
    END,
    NOT_MEASURED,
    START,
    between,
    by_case,
    by_device,
    figure_name,
    full_table,
    headline,
    insert,
    lost,
    readme_block,
    roofline_name,
    with_roof,
)
from ditscale.bench.rows import check_place, committed, merge_rows, read_rows, write_rows
from ditscale.errors import InputError

WIN = case_rows({"eager": 4.0, "compile": 2.0, "ours-cpu": 1.0, "copy": 0.5})
LOSS = case_rows({"eager": 4.0, "compile": 0.5, "ours-cpu": 1.0}, B=16)


def test_losses_come_first_and_are_named() -> None:
    lines = full_table(WIN + LOSS).splitlines()
    assert "B16" in lines[2]
    assert lines[2].endswith("| compile 2.00x |")
    assert lines[3].endswith("| none |")


def test_a_difference_within_the_spread_is_no_loss() -> None:
    close = case_rows({"eager": 4.0, "compile": 0.97, "ours-cpu": 1.0}, spread=0.1)
    assert lost(next(iter(by_case(close).values()))) == {}


def test_a_copy_is_no_rival() -> None:
    assert lost(next(iter(by_case(WIN).values()))) == {}
    assert "| 50 % |" in full_table(WIN)  # half the bandwidth of the copy timed beside it


def test_readme_block_has_the_ratios_of_the_rows_and_says_that_no_gpu_was_measured() -> None:
    text = readme_block(WIN)
    row = next(line for line in text.splitlines() if "B=8" in line)
    assert row.split("|")[3:8] == [" 4 ", " 2 ", " 1 ", " 4.00x ", " 2.00x "]
    assert NOT_MEASURED in text
    assert NOT_MEASURED not in readme_block(WIN + case_rows({"eager": 1.0, "ours-cuda": 0.5}, device="cuda"))


def test_long_times_have_no_exponent() -> None:
    assert "| 1,250 | 999 | 100 |" in readme_block(case_rows({"eager": 1250.0, "compile": 999.4, "ours-cpu": 100.0}))


def test_without_rows_nothing_is_claimed() -> None:
    assert "CPU speed is not yet measured" in readme_block([])
    unmeasured = [r | {"status": "wrong", "reason": "dx is off"} for r in WIN]
    assert "CPU speed is not yet measured" in readme_block(unmeasured)
    assert "dx is off" in full_table(unmeasured)


def test_insert_replaces_what_stands_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    insert(page, "new\\1 | text")
    assert page.read_text() == f"before\n{START}\nnew\\1 | text\n{END}\nafter\n"
    page.write_text("no markers\n")
    with pytest.raises(InputError, match="expected one pair"):
        insert(page, "new")


def test_readme_shows_one_case_of_each_operator_and_pass() -> None:
    text = readme_block(WIN + LOSS)
    assert "B=8" in text
    assert "B=16" not in text
    assert "Of 2 cases, something else measured faster than ours in 1" in text


def _on(device: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"device": row["device"] | {"name": device}} for row in rows]


def test_two_devices_of_a_type_keep_their_own_tables_and_figures(tmp_path: Path) -> None:
    rows = _on("small", WIN) + _on("large", WIN + LOSS)
    assert len({p.name for p in draw_all(rows, tmp_path)}) == 4
    assert readme_block(rows) == readme_block(_on("large", WIN + LOSS))  # the one with more cases
    assert all(f"{device} " in full_table(rows) or f"{device}," in full_table(rows) for device in ("small", "large"))


def _page(name: str) -> str:
    path = Path(__file__).resolve().parents[2] / name
    if not path.is_file():
        pytest.skip(f"{name} is not here: this is an installed package")
    return path.read_text()


def test_the_readmes_table_is_the_one_of_the_committed_rows() -> None:
    assert between(_page("README.md"), "README.md") == readme_block(committed())


def test_the_guides_table_is_the_one_of_the_committed_rows() -> None:
    assert between(_page("docs/benchmarks.md"), "docs/benchmarks.md") == full_table(committed())


def test_the_figures_are_of_the_committed_rows() -> None:
    rows = [r for r in committed() if r["status"] == "measured" and r["suite"] != "ceiling"]
    for device, mine in by_device(rows).items():
        assert not headline(mine) or f"rows {digest(mine)}" in _page(f"docs/images/{figure_name(device)}")
        for op in with_roof(mine):
            of_op = [r for r in mine if r["op"] == op and r.get("roof_share")]
            assert f"rows {digest(of_op)}" in _page(f"docs/images/{roofline_name(op, device)}"), op


def test_the_readme_claims_no_gpu_speed_without_gpu_rows() -> None:
    if not any(r["device"]["type"] == "cuda" and r["status"] == "measured" for r in committed()):
        assert NOT_MEASURED in _page("README.md")


def test_rows_are_written_whole_and_read_back(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "new" / "rows.jsonl", WIN)
    assert read_rows(path) == WIN
    assert [p.name for p in path.parent.iterdir()] == ["rows.jsonl"]


def test_a_place_for_rows_is_looked_at_before_the_work(tmp_path: Path) -> None:
    check_place(tmp_path / "new" / "rows.jsonl")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "file").touch()
    for place, what in ((tmp_path, "got a folder"), (tmp_path / "file" / "rows.jsonl", "a place to write results to")):
        with pytest.raises(InputError, match=what):
            check_place(place)


def test_rows_of_a_case_take_the_place_of_those_that_were_there(tmp_path: Path) -> None:
    path = merge_rows(tmp_path / "rows.jsonl", WIN + LOSS)
    newer = case_rows({"eager": 4.0, "ours-cpu": 0.9})
    assert read_rows(merge_rows(path, newer)) == LOSS + newer
    with pytest.raises(InputError, match="one file a device"):
        merge_rows(path, case_rows({"eager": 1.0}, device="cuda"))


def test_a_damaged_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"schema": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        read_rows(path)
    path.write_text("not json\n")
    with pytest.raises(InputError, match="line 1"):
        read_rows(path)


def test_figures_are_drawn_and_equal_rows_give_equal_files(tmp_path: Path) -> None:
    first = draw_all(WIN + LOSS, tmp_path / "a")
    assert [p.name for p in first] == [
        "roofline-layernorm_modulate-a-cpu-2-threads.svg",
        "speedups-a-cpu-2-threads.svg",
    ]
    assert f"rows {digest([*WIN, *LOSS])}" in first[1].read_text()
    again = draw_all(WIN + LOSS, tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in again]
    fits = [{**row, "suite": "fit", "op": "surface", "roof_share": None} for row in WIN]
    assert draw_all(fits, tmp_path / "c") == [] and not (tmp_path / "c").exists()
    with pytest.raises(InputError, match="got none"):
        draw_all([], tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"\xff\xfe", b"3\n"], ids=["cut", "deep", "bytes", "number"])
def test_a_file_of_something_else_is_named(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.jsonl: expected"):
        read_rows(tmp_path / "rows.jsonl")
