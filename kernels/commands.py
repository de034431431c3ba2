"""This room's part of the command line: ``ditscale doctor``. Heavy imports stand inside the functions."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False)
    triton = facts["triton"] or "not installed"
    console.print(f"ditscale {facts['ditscale']}   Python {facts['python']}   torch {facts['torch']}   triton {triton}")
    for d in facts["devices"]:
        more = (
            f"{d['threads']} threads" if d["type"] == "cpu" else f"{d['capability']}, {d['memory_bytes'] / 1e9:.0f} GB"
        )
        console.print(f"device {d['type']}: {d['name']}, {more}")
    for name, item in facts["libraries"].items():
        isa = f" ({item['instruction_set']})" if item.get("instruction_set") else ""
        console.print(f"{name}: " + (f"[green]loaded[/]{isa}" if item["available"] else f"[yellow]{item['reason']}[/]"))
    table = Table(Column("operator", no_wrap=True), "backend", "runs here", "why not")
    for op, rows in facts["operators"].items():
        for k, (backend, item) in enumerate(rows.items()):
            mark = "[green]yes[/]" if item["available"] else "[yellow]no[/]"
            table.add_row(op if k == 0 else "", backend, mark, item["reason"] or "")
    console.print(table)
    if "checks" in facts:
        table = Table(Column("self-check", no_wrap=True), "backend", "dtype", "device", "result")
        for c in facts["checks"]:
            result = "[green]right[/]" if c["passed"] else f"[red]WRONG: {c['reason']}[/]"
            table.add_row(c["operator"], c["backend"], c["dtype"], c["device"], result)
        console.print(table)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare every available kernel with plain PyTorch.")] = False,
) -> None:
    """Say what runs here, what does not, and why."""
    import json

    from ditscale.kernels.doctor import report

    facts = report(check=check)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        _show(facts)
    if any(not c["passed"] for c in facts.get("checks", [])):
        raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add this room's commands to ``app``."""
    app.command()(doctor)
