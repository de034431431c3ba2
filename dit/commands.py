"""This room's part of the command line: flops and train; what is done with trained models is in image_commands.py."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ditscale.errors import InputError

if TYPE_CHECKING:
    from ditscale.dit.config import DiTConfig

_MOST_THREADS = 4096

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def register(app: typer.Typer) -> None:
    """Add this room's commands to ``app``."""
    from ditscale.dit.image_commands import evaluate, export, sample

    for command in (flops, train, sample, evaluate, export):
        app.command()(command)


def flops(
    model: Annotated[str, typer.Argument(help="A preset such as DiT-XL/2, or a TOML file with a table named model.")],
    image_size: Annotated[
        str | None, typer.Option(help="Pixels: a side, or HEIGHTxWIDTH. Default: the model's.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images.")] = 1,
    convention: Annotated[
        str, typer.Option(help="What counts: matmul, all, hardware, or a published rule.")
    ] = "matmul",
    recompute: Annotated[
        str, typer.Option(help="Activations computed again: none, block, fused-block or attention.")
    ] = "none",
    compare: Annotated[bool, typer.Option("--compare", help="Every convention beside the exact count.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the ledger as a Markdown table.")] = False,
    as_json: Json = False,
) -> None:
    """Count a model's FLOPs and parameters exactly (a multiply-add is 2)."""
    from ditscale.dit import flops as ledger

    config, size = resolve_model(model), parse_size(image_size)
    report = ledger.count(config, size, batch, convention=convention, recompute=recompute)
    others = ledger.compare(config, size, batch, recompute=recompute) if compare else []
    if as_json:
        content = report.to_json() | ({"compare": [row.to_json() for row in others]} if compare else {})
        typer.echo(json.dumps(content))
        return
    if markdown:
        typer.echo(report.to_markdown())
        return
    from rich.console import Console
    from rich.table import Table

    # As wide as the terminal, and wide enough for every number where there is none.
    console = Console(width=None if sys.stdout.isatty() else 200)
    if compare:
        table = Table(title=f"{report.title}: training by each convention", show_lines=True)
        columns = (("convention", "left"), ("train", "right"), ("off", "right"), ("counts", "left"))
        for heading, justify in columns:
            table.add_column(heading, justify=justify, no_wrap=heading != "counts")  # type: ignore[arg-type]
        for row in others:
            table.add_row(row.convention, f"{row.train:,}", f"{row.off_percent:+.2f} %", row.counts)
        console.print(table)
        return
    table = Table(title=f"{report.title}, convention {report.convention}")
    for heading in ("line", "class", "formula"):
        table.add_column(heading, no_wrap=heading == "line")
    for heading in ("forward", "backward", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for cells in report.rows():
        table.add_row(*cells)
    table.add_section()
    table.add_row("total", "", "", f"{report.forward:,}", f"{report.backward:,}", "100 %")
    console.print(table)
    p = report.params
    again = f"   computed again {report.recompute:,}" if report.recompute else ""
    console.print(
        f"train = {report.train:,} FLOPs   convention: {report.convention}{again}\n"
        f"parameters {p.total:,}: {p.per_token:,} work per token, {p.per_sample:,} per image, "
        f"{p.per_context:,} per caption token, {p.embedding:,} looked up; active {p.active:,}\n"
        f"forward multiply-adds {report.macs_forward:,} (the DiT paper's unit)"
    )


def train(
    config: Annotated[
        Path,
        typer.Argument(help="A TOML file: the trainer's fields, a table named model, perhaps one named execution."),
    ],
    out: Annotated[Path, typer.Option(help="The run's folder.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run in that folder.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads of a process. Default: OMP_NUM_THREADS, else all cores.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train one DiT and write its run record. Under torchrun, all its processes train together."""
    from ditscale.dit.config import read_toml
    from ditscale.dit.files import read_json
    from ditscale.dit.training import Execution, Stopped, TrainConfig
    from ditscale.dit.training import train as run_training

    table = read_toml(config)
    execution = Execution.from_dict(table.pop("execution", {}))
    plan = TrainConfig.from_dict(table)
    if (out / "config.json").exists() and not (out / "run.json").exists() and not resume:
        raise InputError(f"--out: {out} holds an unfinished run; give --resume to go on with it")
    first = os.environ.get("RANK", "0") == "0"
    use_threads(threads, processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with stop_signals() as stop:
        try:
            with progress_bar(out.name, show=not as_json and first) as advance:
                record = run_training(plan, out, execution=execution, progress=advance, should_stop=lambda: bool(stop))
        except Stopped as error:
            if first:
                where = "there" if error.saved else "the checkpoint before, if there is one"
                typer.echo(f"stopped: {error}; the same command with --resume goes on from {where}", err=True)
            # As the shell reports a process that such a signal ended. What happened is said already.
            raise SystemExit(128 + (stop[0] if stop else 0)) from error
    if as_json and first:
        typer.echo(json.dumps(read_json(out / "run.json")))
    elif first and record["loss"] is not None:
        typer.echo(
            f"{record['run_id']}: validation loss {record['loss']:.4f} ({record['loss_kind']}) after {record['images']:,} "
            f"images, {record['flops']:.4g} FLOPs (convention {record['flop_convention']}), {record['seconds']:.0f} s"
        )
    if record["status"] != "finished":
        if first:
            why = f" ({record['reason']})" if "reason" in record else ""
            typer.echo(
                f"ditscale: {out}: the run {record['status']} after {record['steps']:,} of {plan.steps:,} steps{why}; it is not "
                "trained again, and a changed configuration needs another --out",
                err=True,
            )
        raise typer.Exit(1)


def resolve_model(text: str) -> DiTConfig:
    """A model from a preset's name or the path of a TOML file."""
    from ditscale.dit.config import DiTConfig

    return DiTConfig.from_toml(text) if text.endswith(".toml") else DiTConfig.preset(text)


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """Pixels from "256" (a side) or "480x832" (height and width)."""
    if text is None:
        return None
    try:
        sides = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2):
        raise InputError(f"--image-size: expected pixels such as 256 or 480x832, got {text!r}")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def use_threads(threads: int | None, *, processes: int = 1) -> None:
    """Set torch's threads; default what OMP_NUM_THREADS says or all cores that this process may use.

    Several processes on this machine share its cores out: there OMP_NUM_THREADS is not the user's word, as torchrun sets it.
    """
    import torch

    if threads is not None and not 1 <= threads <= _MOST_THREADS:
        raise InputError(f"--threads: expected 1 to {_MOST_THREADS}, got {threads}")
    if threads is None and processes > 1:
        threads = max(1, _cores() // processes)
    elif threads is None and not os.environ.get("OMP_NUM_THREADS"):
        threads = _cores()
    if threads is not None:  # else torch has read the variable
        torch.set_num_threads(threads)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_device(name: str | None) -> str:
    """A device by its name; default CUDA where there is one."""
    import torch

    if name not in (None, "cpu", "cuda"):
        raise InputError(f"--device: expected cpu or cuda, got {name!r}")
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise InputError("--device: expected a device that is here, got cuda without a GPU")
    return name or ("cuda" if there else "cpu")


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """While this lasts, Ctrl-C and SIGTERM end up in a list, for the work to come to an orderly end."""
    seen: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, frame: seen.append(got)) for number in numbers]
    try:
        yield seen
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def progress_bar(name: str, *, show: bool) -> Iterator[Callable[[int, int, float], None]]:
    """While this lasts, its value is called with (steps done, steps, loss) and draws a bar on stderr.

    A loss of NaN is none, as where images are drawn: it is not shown.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    times = (TextColumn("{task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, *times, console=Console(stderr=True), disable=not show)
    task = progress.add_task(name, total=None, loss="")

    with contextlib.ExitStack() as stack:

        def advance(done: int, steps: int, loss: float) -> None:
            if not progress.live.is_started:  # with the first step: a mistake in what was asked stands alone
                stack.enter_context(progress)
            progress.update(task, completed=done, total=steps, loss="" if math.isnan(loss) else f"loss {loss:.4f}")

        yield advance
