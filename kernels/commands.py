"""This room's part of the command line: ``ditscale doctor``. Heavy imports stand inside the functions."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape

    # Lines, not a table: this is what bug reports quote, so no terminal's width may cut anything.
    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    console = Console(highlight=False, emoji=False)
    triton = facts["triton"] or "not installed"
    say(f"ditscale {facts['ditscale']}   Python {facts['python']}   torch {facts['torch']}   triton {triton}")
    for d in facts["devices"]:
        more = (
            f"{d['threads']} threads" if d["type"] == "cpu" else f"{d['capability']}, {d['memory_bytes'] / 1e9:.0f} GB"
        )
        say(f"device {d['type']}: {escape(d['name'])}, {more}")
    for name, item in facts["libraries"].items():
        isa = f" ({item['instruction_set']})" if item.get("instruction_set") else ""
        say(f"{name}: " + (f"[green]loaded[/]{isa}" if item["available"] else f"[yellow]{escape(item['reason'])}[/]"))
    for op, rows in facts["operators"].items():
        say(f"\n{op}")
        for backend, item in rows.items():
            why = "[green]runs here[/]" if item["available"] else f"[yellow]does not:[/] {escape(item['reason'])}"
            say(f"  {backend:<10}  {why}")
    if "checks" in facts:
        say("\nself-checks")
    for c in facts.get("checks", []):
        result = "[green]right[/]" if c["passed"] else f"[red]WRONG:[/] {escape(c['reason'])}"
        say(f"  {c['operator']} {c['backend']} {c['dtype']} on {c['device']}: {result}")


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
