"""This room's part of the command line: ``ditscale bench``. Heavy imports stand inside the functions."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ditscale.bench.cases import Case
    from ditscale.bench.rows import Row
    from ditscale.bench.runner import Session

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Out = Annotated[
    Path | None, typer.Option(help="Put the rows into this file (JSONL): in the place of its rows of the same cases.")
]
Against = Annotated[list[str] | None, typer.Option(help="Time only this provider beside ours; give it again for more.")]
Only = Annotated[list[str] | None, typer.Option(help="Only cases whose name contains this; give it again for more.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads. Default: all cores this process may use.")]
Noise = Annotated[bool, typer.Option("--allow-noise", help="Measure on a noisy machine too; every row says so.")]
Tiny = Annotated[bool, typer.Option("--tiny", help="Run every line at sizes of milliseconds; the times mean nothing.")]
Seconds = Annotated[float, typer.Option(help="Time for the samples of one case.")]
Grid = Annotated[
    bool, typer.Option("--grid", help="Every model, token count and batch of 1 to 256 (adaln, attention).")
]
Aot = Annotated[
    bool,
    typer.Option(
        "--aot", help="No times: the table of the compiled GPU kernels (adaln, attention); with --only, --json."
    ),
]
Patience = Annotated[float, typer.Option(help="Seconds to wait for a quiet machine before refusing.")]
Files = Annotated[
    list[Path] | None, typer.Argument(help="Files of rows. Default: those committed under bench/results.")
]


def register(app: typer.Typer) -> None:
    """Add this room's commands to ``app``."""
    group = typer.Typer(
        help="Measure kernels, blocks, steps, fits and counts beside their peers.", no_args_is_help=True
    )
    for name, text in _SUITES.items():
        group.command(name, help=text)(_suite_command(name))
    group.command("all")(run_all)
    from ditscale.bench.aot_commands import aot

    for command in (compare, table, figures, environment, aot):
        group.command(command.__name__)(command)
    app.add_typer(group, name="bench")


_SUITES = {
    "adaln": "The adaLN family and bias-GELU: forward and backward, in the cache and out of it, and host time a call.",
    "attention": "Attention, forward and backward.",
    "block": "One DiT block beside a plain one, eager and compiled.",
    "step": "One training step of a whole DiT beside a plain one, eager and compiled.",
    "flops": "The ledger beside torch's own counter: first equality, then time.",
    "fit": "The fitting engine beside scipy's L-BFGS-B on the same objective.",
}


def _suite_command(name: str) -> Callable[..., None]:
    def command(
        context: typer.Context,
        against: Against = None,
        only: Only = None,
        device: Device = None,
        threads: Threads = None,
        seconds: Seconds = 5.0,
        out: Out = None,
        patience: Patience = 20.0,
        allow_noise: Noise = False,
        tiny: Tiny = False,
        grid: Grid = False,
        aot: Aot = False,
        as_json: Json = False,
    ) -> None:
        from ditscale.bench.rows import check_place, merge_rows, read_rows

        if aot:
            _ahead_of_time(name, only, as_json, context)
            return
        session = _session(device, threads, seconds, patience, allow_noise, tiny, against, as_json, grid)
        chosen = _chosen(session, name, only)
        if out is not None:
            check_place(out)
            if out.exists():
                read_rows(out)
        rows = session.start()
        for row in _rows(session, name, chosen):
            rows.append(row)
            if out is not None:
                merge_rows(out, rows)  # as they come: what is measured is not lost where the rest is stopped
        _finish(rows, session, as_json)

    return command


def _ahead_of_time(suite: str, only: Sequence[str] | None, as_json: bool, context: typer.Context) -> None:
    from ditscale.bench.aot_commands import suite_table
    from ditscale.errors import InputError

    other = [
        p.opts[0]
        for p in context.command.params
        if p.opts[0] not in ("--aot", "--only", "--json") and _given(context, p)
    ]
    if other:
        raise InputError(f"--aot: expected only --only and --json beside it, got {', '.join(other)}")
    suite_table(suite, only or (), as_json)


def _given(context: typer.Context, parameter: Any) -> bool:
    """Whether an option was said, and is not its default's."""
    source = context.get_parameter_source(parameter.name)
    return source is not None and source.name == "COMMANDLINE"


# By which share of the time each suite ends in a run of all: what one leaves over the next one has, and none can take it all.
# Those with cases of minutes (they compile whole models) come first, so that the run's end hangs on cases of seconds.
_ENDS = {"step": 0.15, "block": 0.35, "adaln": 0.65, "attention": 0.85, "flops": 0.9, "fit": 1.0}


def run_all(
    out: Annotated[
        Path | None,
        typer.Option(help="The file that takes the rows when all is done. Default: bench/results/DEVICE.jsonl."),
    ] = None,
    minutes: Annotated[float, typer.Option(help="Leave out what does not fit into this time; the rows say so.")] = 9.5,
    device: Device = None,
    threads: Threads = None,
    seconds: Seconds = 2.0,
    patience: Patience = 60.0,
    allow_noise: Noise = False,
    tiny: Tiny = False,
    as_json: Json = False,
) -> None:
    """Every suite within a given time, the most telling cases first, into one file."""
    from ditscale.bench.devices import machine, slug
    from ditscale.bench.rows import RESULTS, check_place, write_rows
    from ditscale.errors import InputError

    if not 0 <= minutes < 1e6:
        raise InputError(f"--minutes: expected a number of at least 0, got {minutes}")
    session = _session(device, threads, seconds, patience, allow_noise, tiny, None, as_json)
    begun = time.monotonic()
    # A case is not cut short once it has begun; the longest, a compiled training step, is given the time to end.
    whole = 60 * minutes * 0.92
    out = out or RESULTS / f"{slug(machine(session.device))}.jsonl"
    check_place(out)
    rows = session.start()
    # To wait for a quiet machine may take a minute, which all suites lose alike.
    started = time.monotonic()
    for suite, end in _ENDS.items():
        session.deadline = started + (begun + whole - started) * end
        for row in _rows(session, suite, None):
            rows.append(row)
            _write_beside(out, rows)
    write_rows(out, rows)
    _finish(rows, session, as_json)
    _partial(out).unlink(missing_ok=True)
    if not as_json:
        typer.echo(f"{time.monotonic() - begun:.0f} s; rows in {out}")


def _partial(out: Path) -> Path:
    return out.with_suffix(".partial")


def _write_beside(out: Path, rows: Sequence[Row]) -> None:
    """What is there so far, in a file that is not taken for a result."""
    from ditscale.bench.rows import write_rows

    write_rows(_partial(out), rows)


def compare(
    before: Annotated[Path, typer.Argument(help="Rows of the older state.")],
    after: Annotated[Path, typer.Argument(help="Rows of the newer state.")],
    threshold: Annotated[float, typer.Option(help="Smallest change that counts, as a share, beyond the noise.")] = 0.05,
    any_device: Annotated[bool, typer.Option("--any-device", help="Compare files of different devices too.")] = False,
    as_json: Json = False,
) -> None:
    """Say what became slower or faster between two files, with the noise of both in mind. Exit code 1: something did."""
    from ditscale.bench.comparison import compare_rows
    from ditscale.bench.rows import read_rows

    found = compare_rows(read_rows(before), read_rows(after), threshold=threshold, any_device=any_device)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        from rich.table import Table

        view = Table("case", "provider", "before ms", "after ms", "change", "noise", "verdict")
        for change in found.changes:
            view.add_row(*change.cells())
        _console().print(view)
        typer.echo(found.sentence())
    if found.regressions:
        raise typer.Exit(1)


def table(
    files: Files = None,
    into: Annotated[Path | None, typer.Option(help="Write the table between the markers of this file.")] = None,
    every: Annotated[bool, typer.Option("--every", help="Every case, those where we lose first.")] = False,
    as_json: Json = False,
) -> None:
    """The performance table of the README, from rows."""
    from ditscale.bench.report import full_table, insert, readme_block

    rows = _read(files)
    text = full_table(rows) if every else readme_block(rows)
    if into is not None:
        insert(into, text)
    if as_json:
        typer.echo(json.dumps({"markdown": text, "into": str(into) if into else None}))
    elif into is None:
        typer.echo(text)


def figures(
    out: Annotated[Path, typer.Option(help="The folder for the figures.")],
    files: Files = None,
    as_json: Json = False,
) -> None:
    """Draw the roofline of every operator and the speed-ups at a glance, as SVG."""
    from ditscale.bench.figures import draw_all

    paths = [str(path) for path in draw_all(_read(files), out)]
    typer.echo(json.dumps({"figures": paths}) if as_json else "\n".join(paths))


def environment(device: Device = None, threads: Threads = None, as_json: Json = False) -> None:
    """What would stand beside a measurement made here: device, versions, commit, clocks."""
    from ditscale.bench import devices

    devices.pin(threads)
    which = _device(device)
    facts = {"device": devices.machine(which), "versions": devices.versions(), **devices.commit()}
    facts |= {"state": devices.state(which), "file": f"{devices.slug(facts['device'])}.jsonl"}
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        from rich.console import Console

        Console().print(facts)


def _read(files: Sequence[Path] | None) -> list[Row]:
    from ditscale.bench.rows import committed, read_rows

    return [row for path in files for row in read_rows(path)] if files else committed()


def _device(name: str | None) -> str:
    import torch

    from ditscale.errors import InputError

    if name not in (None, "cpu", "cuda"):
        raise InputError(f"--device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device: expected a device that is here, got cuda without a GPU")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _session(
    device: str | None,
    threads: int | None,
    seconds: float,
    patience: float,
    allow_noise: bool,
    tiny: bool,
    against: list[str] | None,
    quiet: bool,
    grid: bool = False,
) -> Session:
    from ditscale.bench import devices

    devices.pin(threads)  # before torch loads
    from ditscale.bench.runner import Session
    from ditscale.bench.timing import TINY, Protocol
    from ditscale.errors import InputError

    if not patience >= 0:
        raise InputError(f"--patience: expected a number of at least 0, got {patience}")
    if not seconds > 0:
        raise InputError(f"--seconds: expected a positive number, got {seconds}")
    which = _device(device)

    def say(line: str) -> None:
        if not quiet:
            sys.stderr.write(line + "\n")

    return Session(
        device=which,
        protocol=TINY if tiny else Protocol(seconds=seconds, patience_seconds=patience),
        allow_noise=allow_noise,
        against=tuple(against or ()),
        tiny=tiny,
        whole_grid=grid,
        say=say,
    )


def _chosen(session: Session, suite: str, only: Sequence[str] | None) -> list[Case] | None:
    """The cases that ``--only`` asks for, None for all; ``--against`` and ``--grid`` are checked."""
    from ditscale.bench.cases import cases
    from ditscale.errors import InputError

    known = session.providers(suite) if session.against else []
    for name in session.against:
        if name not in known:
            raise InputError(f"--against: expected {_one_of(known)} for {suite} on this device, got {name!r}")
    if session.whole_grid and suite not in ("adaln", "attention"):
        raise InputError(f"--grid: expected adaln or attention, got {suite}")
    if not only:
        return None
    if suite in ("fit", "flops"):
        raise InputError(f"--only: expected none for {suite}, got {only[0]!r}")
    every = cases(suite, session.device, tiny=session.tiny, whole_grid=session.whole_grid)
    chosen = [case for case in every if any(text in case.id for text in only)]
    if not chosen:
        raise InputError(f"--only: expected a part of a case's name such as {every[0].id!r}, got {only[0]!r}")
    return chosen


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}" if names else "none"


def _rows(session: Session, suite: str, chosen: Sequence[Case] | None) -> Iterator[Row]:
    for row in session.suite(suite, only=chosen):
        session.say(_line(row))
        yield row


def _line(row: Row) -> str:
    if row["status"] != "measured":
        return f"{row['case']}  {row['provider']}: {row['status']}, {row['reason']}"
    over = ", ".join(f"{r['median']:.2f}x {name}" for name, r in row["speedup_over"].items())
    share = f"  {100 * row['roof_share']:.0f} % of roof" if row.get("roof_share") else ""
    return f"{row['case']}  {row['provider']}: {row['time_ms']:.4g} ms{share}  {over}"


def _finish(rows: list[Row], session: Session, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_report(rows, session)))
        return
    from rich.table import Table

    from ditscale.bench.report import table_cells

    head, body = table_cells(rows)
    view = Table(*head)
    for cells in body:
        view.add_row(*cells)
    _console().print(view)


def _console() -> Any:
    """As wide as the terminal, and wide enough for a line where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 200)


def _report(rows: list[Row], session: Session) -> dict[str, Any]:
    """Rows without what they all share, which stands once."""
    shared = ("schema", "device", "versions", "commit", "dirty")
    return {
        **{name: session.common[name] for name in shared},
        "ceilings": [_without(row, shared) for row in rows if row["suite"] == "ceiling"],
        "rows": [_without(row, shared) for row in rows if row["suite"] != "ceiling"],
    }


def _without(row: Row, names: Sequence[str]) -> Row:
    return {k: v for k, v in row.items() if k not in names}
