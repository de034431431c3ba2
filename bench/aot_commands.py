"""``ditscale bench aot`` and ``--aot``: the ahead-of-time table, its check against the budget, and the update of the budget."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ditscale.bench.aot_table import Table

Row = dict[str, Any]

_SHOWN = 40  # findings that a person is told one by one


def aot(
    family: Annotated[list[str] | None, typer.Argument(help="Families of kernels, or cuda. Default: all.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only kernels whose name contains this.")] = None,
    arch: Annotated[list[int] | None, typer.Option(help="Only this compute capability, such as 90.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Exit with 1 where a kernel is worse than its budget, or the budget stale.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compile everything, also what the budget knows.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Write what is found into the budget.")] = False,
    accept_worse: Annotated[bool, typer.Option("--accept-worse", help="Let --update write what is worse.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Registers, spills, shared memory, instructions and predicted bytes of every kernel and architecture; no GPU needed."""
    from ditscale.errors import InputError

    if update and (only or arch):
        raise InputError("--update: expected whole families, got a part of one (--only or --arch)")
    _run(family or (), only or (), arch or (), check, fresh, update, accept_worse, as_json)


def suite_table(suite: str, only: Sequence[str], as_json: bool) -> None:
    """What ``ditscale bench adaln --aot`` prints: the table of the suite's Triton kernels and the CUDA library, one file.

    Raises:
        InputError: a suite that measures no operator with GPU kernels.
    """
    from ditscale.bench.aot import families, launches
    from ditscale.bench.cases import cases
    from ditscale.errors import InputError

    measured = {case.op for case in cases(suite, "cuda")} if suite not in ("fit", "flops") else set()
    chosen = [name for name in families() if any(launch.op in measured for launch in launches(name))]
    if not chosen:
        raise InputError(f"--aot: expected a suite of operators with GPU kernels, such as adaln, got {suite}")
    _run([*chosen, "cuda"], only, (), False, False, False, False, as_json)


def _run(
    families: Sequence[str],
    only: Sequence[str],
    archs: Sequence[int],
    check: bool,
    fresh: bool,
    update: bool,
    accept_worse: bool,
    as_json: bool,
) -> None:
    from ditscale.bench.aot_table import gather

    def say(line: str) -> None:
        if not as_json:
            sys.stderr.write(f"compiling {line}\n")

    table = gather(families, archs=archs, only=only, fresh=fresh, quick=check and not fresh, say=say)
    refused = update and not accept_worse and bool(table.of("worse"))
    if update and not refused:
        for path in table.write():
            sys.stderr.write(f"wrote {path}\n")
    if as_json:
        typer.echo(json.dumps(table.to_json()))
    else:
        if not check:
            _show(table)
        for finding in table.findings[:_SHOWN]:
            typer.echo(f"{finding.level}: {finding.key} {finding.text}")
        if len(table.findings) > _SHOWN:
            typer.echo(f"and {len(table.findings) - _SHOWN} more")
        typer.echo(table.sentence())
    if refused:
        sys.stderr.write(
            "the budget stays as it is, for some kernels are worse; --accept-worse writes it all the same\n"
        )
    if refused or (check and (table.of("worse") or table.of("stale"))):
        raise typer.Exit(1)


def _show(table: Table) -> None:
    """A line a kernel, its architectures side by side."""
    from rich.console import Console
    from rich.table import Table as View

    view = View(
        "case",
        "kernel",
        "sm",
        "registers",
        "local",
        "shared",
        "16 B",
        "blocks",
        "products",
        "useful",
        "MB",
        "us at the roof",
    )
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in table.rows():
        groups.setdefault((row["family"], row["case"], row["kernel"]), []).append(row)
    for (_, case, kernel), rows in groups.items():
        first = rows[0]
        cores = [sum(r["mix"].get(n, 0) for n in ("HMMA", "HGMMA", "UTCHMMA")) for r in rows]
        moved = first.get("bytes_moved")
        view.add_row(
            case,
            kernel,
            " ".join(r["arch"].removeprefix("sm_") for r in rows),
            _each(rows, "registers"),
            str(max(r["stack"] for r in rows)),
            _each(rows, "shared"),
            f"{100 * min(r['wide_share'] for r in rows):.0f} %" if any(r["mix"] for r in rows) else "",
            _each(rows, "blocks_per_sm"),
            " ".join(map(str, cores)) if any(cores) else "",
            _useful(first),
            f"{moved / 1e6:.1f}" if moved else "",
            " ".join(f"{r['roof_us']:.1f}" if r.get("roof_us") else "-" for r in rows) if moved else "",
        )
    Console(width=None if sys.stdout.isatty() else 220).print(view)


def _useful(row: Row) -> str:
    """Useful over issued FLOPs of matrix products: of the launch, or of each head width that a CUDA kernel takes."""
    of_heads = row.get("flop_efficiency_by_head", {})
    shares = [f"{K}: {100 * share:.0f} %" for K, share in of_heads.items()]
    if "flop_efficiency" in row:
        shares.append(f"{100 * row['flop_efficiency']:.0f} %")
    return " ".join(shares)


def _each(rows: Sequence[Row], name: str) -> str:
    values = [str(row[name]) if row[name] is not None else "" for row in rows]
    return values[0] if len(set(values)) == 1 else " ".join(values)
