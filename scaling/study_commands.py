"""The command line of studies: study design, run and status; demo; report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ditscale.scaling.execute import Progress
    from ditscale.scaling.study import Study

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add the commands to ``app``."""
    group = typer.Typer(help="Design, run and follow an isoFLOP study.", no_args_is_help=True)
    for name, command in (("design", design), ("run", run), ("status", status)):
        group.command(name)(command)
    app.add_typer(group, name="study")
    app.command()(demo)
    app.command()(report)


def design(
    config: Annotated[Path, typer.Argument(help="A study in TOML.")],
    out: Annotated[Path | None, typer.Option(help="Make the study's folder here. Default: only show.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Say how many hours of this machine it takes: h100, a100, ...")
    ] = None,
    mfu: Annotated[float | None, typer.Option(help="Measured share of the GPU's peak.")] = None,
    as_json: Json = False,
) -> None:
    """Lay out the grid of a study from the exact ledger."""
    from ditscale.scaling.planner import machine_rate
    from ditscale.scaling.study import Study, StudyConfig
    from ditscale.scaling.study import design as lay_out

    rate, machine = machine_rate(gpu, mfu, None, 1)
    plan = StudyConfig.from_toml(config)
    grid = Study.create(out, plan).grid if out is not None else lay_out(plan)
    total = sum(row.flops for row in grid)
    if machine is not None and rate is not None:
        machine |= {"grid_hours": total / rate / 3600, "target_hours": plan.target / rate / 3600}
    if as_json:
        rows = [row.to_dict() for row in grid]
        typer.echo(json.dumps({"name": plan.name, "target_budget": plan.target, "grid": rows, "machine": machine}))
        return
    _print_grid(grid, {})
    typer.echo(f"{len(grid)} runs, {total:.3g} training FLOPs, then {plan.target:.3g} for the predicted run")
    if machine is not None:
        typer.echo(
            f"{machine['grid_hours']:.3g} h and {machine['target_hours']:.3g} h on one {gpu} at MFU "
            f"{machine['mfu']:.2f} ({machine['mfu_source']})"
        )


def run(
    study: Annotated[Path, typer.Argument(help="A study in TOML (with --out), or a study's folder.")],
    out: Annotated[Path | None, typer.Option(help="The study's folder, where a TOML file is given.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="Where the runs are trained: local, slurm or ray. Default: as the study says.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for slurm (submitit's parameters) or ray; give it again for more."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Train what a study still lacks, fit, predict, train the predicted run, and write the page."""
    from ditscale.errors import InputError
    from ditscale.scaling.study import Study, StudyConfig

    if study.is_dir():
        if out is not None and out.resolve() != study.resolve():
            raise InputError(f"--out: expected none with a study's folder, where everything is written, got {out}")
        opened = Study(study)
    elif out is None:
        raise InputError("--out: expected the folder that the study is written to, got none")
    else:
        opened = Study.create(out, StudyConfig.from_toml(study))
    _carry_out(opened, engine=engine, options=_options(option or []), as_json=as_json)


def status(
    folder: Annotated[Path, typer.Argument(help="A study's folder.")],
    as_json: Json = False,
) -> None:
    """Say how far a study has come."""
    from ditscale.scaling.study import Study

    study = Study(folder)
    records, complaints = study.records()
    done = {record["run_id"]: record for record in records}
    finished = [row for row in study.grid if row.run_id in done]
    stages = {name: (folder / f"{name}.json").is_file() for name in ("laws", "prediction", "outcome")}
    if as_json:
        content = {"runs": len(study.grid), "finished": len(finished), "stages": stages, "damaged": complaints}
        share = sum(row.flops for row in finished) / sum(row.flops for row in study.grid)
        typer.echo(json.dumps(content | {"flops_share": share}))
        return
    _print_grid(study.grid, done)
    typer.echo(
        f"{len(finished)} of {len(study.grid)} runs finished; "
        + ", ".join(f"{name} {'written' if there else 'to come'}" for name, there in stages.items())
    )
    for complaint in complaints:
        typer.echo(f"damaged: {complaint}")


def demo(
    out: Annotated[Path, typer.Option(help="The folder for everything; the same command goes on where it was.")],
    quick: Annotated[bool, typer.Option("--quick", help="A study of under two minutes, for tests; same code.")] = False,
    as_json: Json = False,
) -> None:
    """A scaling law on embedded real images, and a prediction made before the run that tests it."""
    from ditscale.scaling.demo_study import demo_study
    from ditscale.scaling.study import Study

    _carry_out(Study.create(out, demo_study(quick=quick)), as_json=as_json)


def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder.")],
    as_json: Json = False,
) -> None:
    """Write a study's page, report.html, from what its folder holds."""
    from ditscale.scaling.report import write_report

    path = write_report(folder)
    typer.echo(json.dumps({"report": str(path)}) if as_json else f"{path}")


def _options(given: list[str]) -> dict[str, Any]:
    """NAME=VALUE as a dictionary; a value that is JSON is what it says, any other a text."""
    from ditscale.errors import InputError

    options: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise InputError(f"--option: expected NAME=VALUE, got {text!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _carry_out(
    study: Study, *, as_json: bool, engine: str | None = None, options: dict[str, Any] | None = None
) -> None:
    from ditscale.scaling.conduct import conduct
    from ditscale.scaling.execute import Interrupted

    def say(sentence: str) -> None:
        print(f"ditscale: {sentence}", file=sys.stderr, flush=True)

    try:
        with _display(quiet=as_json) as show:
            outcome = conduct(study, show=show, say=say, engine=engine, options=options)
    except Interrupted as error:
        say("stopped; the same command goes on where it was")
        raise SystemExit(130) from error
    if as_json:
        typer.echo(json.dumps(outcome))
        return
    low, high = outcome["interval_95"]
    typer.echo(
        f"\npredicted {outcome['predicted_loss']:.4f} (95 % interval {low:.4f} to {high:.4f}), measured "
        f"{outcome['measured_loss']:.4f}: off by {100 * outcome['relative_error']:+.2f} %, "
        f"{'inside' if outcome['inside_interval'] else 'OUTSIDE'} the interval, "
        f"{outcome['extrapolation_factor']:.1f} times beyond the fitted budgets\n"
        f"{outcome['flops_spent']:.3g} FLOPs in {outcome['seconds']:.0f} s; the page: {study.folder / 'report.html'}"
    )


@contextmanager
def _display(*, quiet: bool) -> Iterator[Callable[[str, Progress | None], None]]:
    """A function that shows (stage, progress) as bars on a terminal, and as a line per finished run elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    drawn = console.is_terminal and not quiet
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"))
    more = (TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Bars(*columns, *more, console=console, disable=not drawn, transient=True) as bars:
        view = _View(bars, None if quiet or drawn else console)
        yield view.show


class _View:
    """Keeps the bars, and the rate from which the time left follows."""

    def __init__(self, bars: Any, plain: Any) -> None:
        self.bars, self.plain = bars, plain
        self.stage = ""
        self.tasks: dict[str, Any] = {}
        self.started: tuple[float, float] = (0.0, 0.0)
        self.told = 0

    def show(self, stage: str, progress: Progress | None = None) -> None:
        if stage != self.stage:
            for task in self.tasks.values():
                self.bars.remove_task(task)
            self.tasks, self.stage, self.told = {}, stage, len(progress.finished) if progress else 0
            self.started = (time.monotonic(), progress.done if progress else 0.0)
            if self.plain is not None:
                self.plain.print(stage, highlight=False)
        if progress is None:
            self._bar("stage", stage, 0, None, "")
            return
        spent = progress.done + sum(progress.flops_of(run) for run in progress.active)
        self._bar("stage", stage, spent, progress.total, self._time_left(spent, progress.total))
        for run, (done, steps, loss) in progress.active.items():
            self._bar(run, f"  {run}", done, steps, f"loss {loss:.4f}")
        for run in [name for name in self.tasks if name != "stage" and name not in progress.active]:
            self.bars.remove_task(self.tasks.pop(run))
        for record in progress.finished[self.told :]:
            if self.plain is not None:
                result = "diverged" if record["loss"] is None else f"loss {record['loss']:.4f}"
                left = self._time_left(spent, progress.total)
                self.plain.print(
                    f"  {record['run_id']}: {record['flops']:.2e} FLOPs, {result}; {left}", highlight=False
                )
        self.told = len(progress.finished)

    def _bar(self, name: str, text: str, done: float, total: float | None, note: str) -> None:
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(text, total=total, note=note)
        self.bars.update(self.tasks[name], completed=done, total=total, note=note)

    def _time_left(self, spent: float, total: float) -> str:
        start, before = self.started
        rate = (spent - before) / max(time.monotonic() - start, 1e-9)
        if rate <= 0:
            return "time left unknown"
        seconds = (total - spent) / rate
        return f"{seconds / 60:.1f} min left" if seconds > 90 else f"{seconds:.0f} s left"


def _print_grid(grid: Any, done: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for heading in ("budget", "width", "depth", "parameters per token", "images", "steps", "lr", "loss"):
        table.add_column(heading, justify="right")
    for row in grid:
        shown = row.to_dict()
        record = done.get(row.run_id)
        loss = "" if record is None else "diverged" if record["loss"] is None else f"{record['loss']:.4f}"
        cells = (f"{row.budget:.3g}", shown["width"], shown["depth"], f"{row.params_per_token:,}", f"{row.images:,}")
        table.add_row(*map(str, cells), str(row.steps), f"{shown['lr']:.2g}", loss)
    # As wide as the terminal, and wide enough for every number where there is none.
    Console(width=None if sys.stdout.isatty() else 200).print(table)
