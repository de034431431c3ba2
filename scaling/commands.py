"""This room's part of the command line. Heavy imports stand inside the functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ditscale.scaling.runs import RunTable

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
File = Annotated[
    Path,
    typer.Argument(help="CSV, JSONL, JSON or Parquet with one finished run a row, trackio's .db, or a study's folder."),
]
Column = Annotated[str | None, typer.Option(help="Column of this role. Default: the column of that name.")]
Where = Annotated[str | None, typer.Option(help="Keep rows for which this holds: 'params > 1e7 and lr == 0.001'.")]
DropHighest = Annotated[int, typer.Option(help="Leave out this many rows of highest loss.")]
SixNd = Annotated[
    bool, typer.Option("--tokens-from-6nd", help="Derive tokens as C/(6N): a language model's convention.")
]
LastStep = Annotated[bool, typer.Option("--last-step", help="Of a tracker's step log, keep each run's last values.")]
Pool = Annotated[bool, typer.Option("--pool", help="Accept runs that differ in loss convention, schedule or data.")]
Intervals = Annotated[
    str, typer.Option(help="auto, components, delta, case-t, jackknife, case, cluster, wild or profile.")
]


def register(app: typer.Typer) -> None:
    """Add this room's commands to ``app``."""
    fit = typer.Typer(help="Fit a scaling law to finished runs.", no_args_is_help=True)
    for name, command in (("surface", surface), ("isoflop", isoflop), ("power", power), ("hparams", hparams)):
        fit.command(name)(command)
    app.add_typer(fit, name="fit")
    rest: tuple[Callable[..., None], ...] = (plan, predict, backtest, compare, suggest, draw, laws, coverage)
    for each in rest:
        app.command()(each)

    # Studies, the demo and the report have their own page.
    from ditscale.scaling import study_commands

    study_commands.register(app)


def surface(
    file: File,
    params: Column = None,
    tokens: Column = None,
    images: Column = None,
    flops: Column = None,
    loss: Column = None,
    budget: Column = None,
    tokens_from_6nd: SixNd = False,
    drop_highest: DropHighest = 0,
    where: Where = None,
    last_step: LastStep = False,
    pool: Pool = False,
    law: Annotated[
        str,
        typer.Option(
            help="surface, surface-tied, surface-floorless, skaling, kaplan, farseer, moe, moe-density, repetition, video."
        ),
    ] = "surface",
    other: Annotated[
        list[str] | None,
        typer.Option("--input", help="NAME=COLUMN of a law's other input, such as unique=unique_images."),
    ] = None,
    loss_fn: Annotated[
        str, typer.Option(help="huber:DELTA, huber:auto, l1, mse, student-t:DOF or envelope:RATIO.")
    ] = "huber:auto",
    space: Annotated[str, typer.Option(help="log or raw residuals.")] = "log",
    starts: Annotated[int, typer.Option(help="Starts of the variable-projection grid to polish.")] = 8,
    bootstrap: Annotated[int, typer.Option(help="Draws of the case bootstrap for standard deviations.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    intervals: Intervals = "auto",
    as_json: Json = False,
) -> None:
    """Fit the loss surface L(N, D) and its compute-optimal allocation."""
    from ditscale.scaling.surface import fit_surface

    table = _runs(locals())
    _print(
        fit_surface(
            table,
            law=law,
            inputs=_pairs(other),
            loss_fn=loss_fn,
            space=space,
            starts=starts,
            bootstrap=bootstrap,
            seed=seed,
            interval_method=intervals,
        ),
        as_json,
    )


def isoflop(
    file: File,
    budget: Column = None,
    params: Column = None,
    tokens: Column = None,
    images: Column = None,
    flops: Column = None,
    loss: Column = None,
    tokens_from_6nd: SixNd = False,
    drop_highest: DropHighest = 0,
    where: Where = None,
    last_step: LastStep = False,
    pool: Pool = False,
    vertex: Annotated[str, typer.Option(help="parabola (as published) or cubic (less biased).")] = "parabola",
    space: Annotated[str, typer.Option(help="Curves of the raw loss, or of its log.")] = "raw",
    bootstrap: Annotated[int, typer.Option(help="Draws of the run-level bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit a curve of loss against size at every budget, and power laws through the minima."""
    from ditscale.scaling.isoflop import fit_isoflop

    table = _runs(locals())
    _print(fit_isoflop(table, vertex=vertex, space=space, bootstrap=bootstrap, seed=seed), as_json)


def power(
    file: File,
    x: Annotated[str, typer.Option(help="Column of x, such as compute.")] = "flops",
    y: Annotated[str, typer.Option(help="Column of y, such as a loss or FID.")] = "loss",
    floor: Annotated[str, typer.Option(help="none, free, or a number.")] = "none",
    optimal: Annotated[
        bool, typer.Option("--optimal", help="Of each budget, only the run of least loss: the compute-optimal path.")
    ] = False,
    feature_network: Annotated[
        str | None,
        typer.Option(
            help="y is a quality metric such as FID on these features: inception-v3, ... Default: as the runs say."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Of a quality metric: generated images a value. Default: as the runs say.")
    ] = None,
    seed_noise: Annotated[
        float | None, typer.Option(help="Of a quality metric: spread between seeds, as a share. Default: 0.01.")
    ] = None,
    where: Where = None,
    last_step: LastStep = False,
    pool: Pool = False,
    loss_fn: Annotated[str, typer.Option(help="mse, huber:DELTA, huber:auto, l1, ...")] = "mse",
    space: Annotated[str, typer.Option(help="log or raw residuals.")] = "log",
    seed: Annotated[int, typer.Option(help="Of bootstraps.")] = 0,
    intervals: Intervals = "auto",
    as_json: Json = False,
) -> None:
    """Fit y = floor + coefficient * x ** exponent."""
    from ditscale.errors import InputError
    from ditscale.scaling.power import fit_power
    from ditscale.scaling.quality import FEATURE_METRICS, SEED_NOISE, fit_quality_of_runs

    table = _table(file, where=where, last_step=last_step, pool=pool)
    if feature_network is not None or (y in FEATURE_METRICS and "feature_network" in table.columns):
        of_power = {
            "loss-fn": (loss_fn, "mse"),
            "space": (space, "log"),
            "seed": (seed, 0),
            "intervals": (intervals, "auto"),
        }
        for name, (given, only) in of_power.items():
            if given != only:
                raise InputError(
                    f"{name}: expected {only} for a law of quality, which is fitted in that way, got {given!r}"
                )
        quality = fit_quality_of_runs(
            table,
            metric=y,
            x=x,
            feature_network=feature_network,
            samples=samples,
            floor=floor,
            seed_noise=SEED_NOISE if seed_noise is None else seed_noise,
            optimal=optimal,
            pool=pool,
        )
        _print(quality, as_json)
        return
    for name, value in (("samples", samples), ("seed-noise", seed_noise)):
        if value is not None:
            raise InputError(
                f"{name}: expected --feature-network with it, or runs that name theirs, got {value!r} alone"
            )
    table = table.best_of_budgets() if optimal else table
    result = fit_power(
        table.column(x),
        table.column(y),
        floor=floor,
        loss_fn=loss_fn,
        space=space,
        seed=seed,
        interval_method=intervals,
    )
    if y in FEATURE_METRICS:
        result.warnings.append(
            f"{y} without --feature-network: values on different features are different metrics, and seed noise is not counted"
        )
    _print(result, as_json)


def plan(
    law: Annotated[str, typer.Option(help="A published law's name, a saved fit (JSON), or a study's folder.")],
    budget: Annotated[float | None, typer.Option(help="Training compute in FLOPs.")] = None,
    target_loss: Annotated[float | None, typer.Option(help="Or: the loss to reach.")] = None,
    hours: Annotated[float | None, typer.Option(help="Or: wall time on --gpus machines.")] = None,
    gpu: Annotated[str | None, typer.Option(help="h100, a100, h200, b200, rtx4090, mi300x, ...")] = None,
    gpus: Annotated[int, typer.Option(help="How many.")] = 1,
    mfu: Annotated[float | None, typer.Option(help="Measured share of the GPU's peak.")] = None,
    flops_per_second: Annotated[float | None, typer.Option(help="Measured throughput of one machine.")] = None,
    batch: Annotated[int | None, typer.Option(help="Images a step.")] = None,
    hparams: Annotated[str | None, typer.Option(help="A law of batch and learning rate: a name or a file.")] = None,
    quality: Annotated[
        Path | None, typer.Option(help="A saved law of quality (`fit power --y frechet_distance --json`).")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Pixels on a side. Default: of --config, of the study, else 256.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML with the DiT's other fields. Default: the study's models, else a DiT/2.")
    ] = None,
    aspect: Annotated[
        float | None, typer.Option(help="Width over depth of the DiT. Default: the study's rule, else 64.")
    ] = None,
    head_width: Annotated[int | None, typer.Option(help="Width of a head. Default: the study's rule, else 64.")] = None,
    params_kind: Annotated[str | None, typer.Option(help="What the law's N counts: per_token or total.")] = None,
    inference_images: Annotated[float, typer.Option(help="Images to be generated in the model's life.")] = 0.0,
    evaluations_per_image: Annotated[float, typer.Option(help="Forward passes an image.")] = 50.0,
    spend: Annotated[float | None, typer.Option(help="FLOPs for the next runs that the plan suggests.")] = None,
    no_config: Annotated[bool, typer.Option("--no-config", help="Do not design a DiT.")] = False,
    as_json: Json = False,
) -> None:
    """Say what to train with a budget, a target loss or a deadline."""
    from ditscale.dit.config import DiTConfig
    from ditscale.scaling.planner import plan as make

    _print(
        make(
            law,
            budget=budget,
            target_loss=target_loss,
            hours=hours,
            gpu=gpu,
            gpus=gpus,
            mfu=mfu,
            flops_per_second=flops_per_second,
            batch=batch,
            hparams=hparams,
            quality=quality,
            template=DiTConfig.from_toml(config) if config else None,
            image_size=image_size,
            aspect=aspect,
            head_width=head_width,
            params_kind=params_kind,
            configure=not no_config,
            inference_images=inference_images,
            evaluations_per_image=evaluations_per_image,
            spend=spend,
        ),
        as_json,
    )


def hparams(
    file: File,
    params: Column = None,
    tokens: Column = None,
    images: Column = None,
    flops: Column = None,
    loss: Column = None,
    tokens_from_6nd: SixNd = False,
    lr: Annotated[str, typer.Option(help="Column of peak learning rates.")] = "lr",
    batch: Annotated[str, typer.Option(help="Column of batch sizes.")] = "batch",
    where: Where = None,
    last_step: LastStep = False,
    pool: Pool = False,
    bootstrap: Annotated[int, typer.Option(help="Draws of the cell bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit the best learning rate and batch as power laws of N and D, from cells of runs."""
    from ditscale.scaling.hparams import fit_hparams

    table = _runs(locals())
    _print(fit_hparams(table, lr=lr, batch=batch, bootstrap=bootstrap, seed=seed), as_json)


def predict(
    file: File,
    flops: Annotated[float | None, typer.Option(help="Compute of the new run.")] = None,
    params: Annotated[float | None, typer.Option(help="Its size.")] = None,
    data: Annotated[float | None, typer.Option(help="Its images or tokens, as the table counts.")] = None,
    law: Annotated[str, typer.Option(help="auto, or one law by name.")] = "auto",
    size: Annotated[str | None, typer.Option(help="Column of model sizes. Default: params.")] = None,
    tokens: Column = None,
    images: Column = None,
    compute: Annotated[str | None, typer.Option(help="Column of compute. Default: flops.")] = None,
    loss: Column = None,
    budget: Column = None,
    tokens_from_6nd: SixNd = False,
    where: Where = None,
    last_step: LastStep = False,
    pool: Pool = False,
    as_json: Json = False,
) -> None:
    """Predict the loss of a new run, the law chosen on held-out compute. Two of flops, params and data are enough."""
    from ditscale.scaling.forecast import predict_loss

    table = _table(
        file,
        params=size,
        tokens=tokens,
        images=images,
        flops=compute,
        loss=loss,
        budget=budget,
        tokens_from_6nd=tokens_from_6nd,
        where=where,
        last_step=last_step,
        pool=pool,
    )
    _print(predict_loss(table, flops=flops, params=params, data=data, law=law), as_json)


def backtest(
    file: File,
    params: Column = None,
    tokens: Column = None,
    images: Column = None,
    flops: Column = None,
    loss: Column = None,
    budget: Column = None,
    tokens_from_6nd: SixNd = False,
    drop_highest: DropHighest = 0,
    by: Annotated[str, typer.Option(help="Hold out the top of: budget, params or data.")] = "budget",
    law: Annotated[list[str] | None, typer.Option(help="A candidate; repeat for several. Default: all.")] = None,
    where: Where = None,
    last_step: LastStep = False,
    pool: Pool = False,
    as_json: Json = False,
) -> None:
    """Score law forms on compute that they did not see."""
    from ditscale.scaling.holdout import backtest as score

    table = _runs(locals())
    _print(score(table, axis=by, laws=law), as_json)


def compare(
    first: Annotated[Path, typer.Argument(help="Runs of one design or data set.")],
    second: Annotated[Path, typer.Argument(help="Runs of the other.")],
    target: Annotated[float | None, typer.Option(help="Compute at which losses are compared.")] = None,
    params: Column = None,
    tokens: Column = None,
    images: Column = None,
    flops: Column = None,
    loss: Column = None,
    budget: Column = None,
    tokens_from_6nd: SixNd = False,
    where: Where = None,
    law: Annotated[str, typer.Option(help="The surface that is fitted to each.")] = "surface",
    last_step: LastStep = False,
    pool: Pool = False,
    as_json: Json = False,
) -> None:
    """Compare how two designs or data sets scale: differences with intervals."""
    from ditscale.scaling.comparison import compare as set_against

    options = _columns(locals())
    tables = [_table(file, **options) for file in (first, second)]
    names = (first.stem, second.stem) if first.stem != second.stem else (str(first), str(second))
    _print(set_against(*tables, target=target, names=names, law=law, pool=pool), as_json)


def suggest(
    file: File,
    target: Annotated[float, typer.Option(help="Compute at which the answer matters.")],
    spend: Annotated[float, typer.Option(help="FLOPs to spend on the suggested runs.")],
    quantity: Annotated[str, typer.Option(help="loss or params.")] = "loss",
    count: Annotated[int, typer.Option(help="At most so many runs.")] = 4,
    params: Annotated[
        str | None, typer.Option("--params", "--size", help="Column of model sizes. Default: params.")
    ] = None,
    tokens: Column = None,
    images: Column = None,
    flops: Column = None,
    loss: Column = None,
    budget: Column = None,
    tokens_from_6nd: SixNd = False,
    where: Where = None,
    last_step: LastStep = False,
    pool: Pool = False,
    as_json: Json = False,
) -> None:
    """Suggest the next runs: those that shrink the interval at the target most for their compute."""
    from ditscale.scaling.nextruns import suggest_runs
    from ditscale.scaling.surface import fit_surface

    table = _runs(locals())
    _print(suggest_runs(fit_surface(table), target=target, spend=spend, quantity=quantity, count=count), as_json)


def laws(as_json: Json = False) -> None:
    """List the published laws that `plan --law` and `plan --hparams` know, with their sources and rounding."""
    from ditscale.scaling.registry import PUBLISHED

    if as_json:
        from ditscale.scaling.jsonable import dumps

        typer.echo(dumps({name: law.to_json() for name, law in PUBLISHED.items()}))
        return
    # Lines and no table, which a narrow terminal cuts: a name must be typed, an arXiv number looked up.
    for law in PUBLISHED.values():
        digits = {
            **{k: v.digits for k, v in law.laws.items()},
            **({"surface": law.surface.digits} if law.surface else {}),
        }
        holds = ", ".join(f"{k} ({n} digit{'s' if n != 1 else ''})" for k, n in digits.items())
        typer.echo(f"{law.name}\n  {law.title}\n  holds {holds} as printed\n  {law.source}")


def draw(
    source: Annotated[Path, typer.Argument(help="JSON of a fit or backtest, a study's folder, or a table of runs.")],
    out: Annotated[Path, typer.Option(help="Folder for the figures.")],
    kind: Annotated[str, typer.Option(help="svg or png.")] = "svg",
    params: Column = None,
    tokens: Column = None,
    images: Column = None,
    flops: Column = None,
    loss: Column = None,
    budget: Column = None,
    tokens_from_6nd: SixNd = False,
    where: Where = None,
    last_step: LastStep = False,
    pool: Pool = False,
    as_json: Json = False,
) -> None:
    """Draw the figures of a fit: curves, optima, residuals, the floor's profile, exponents, backtest."""
    from ditscale.scaling.fit_figures import draw_files

    paths = [str(path) for path in draw_files(source, out, kind=kind, **_columns(locals()))]
    if as_json:
        from ditscale.scaling.jsonable import dumps

        typer.echo(dumps({"figures": paths}))
        return
    typer.echo("\n".join(paths))


def coverage(
    draws: Annotated[int, typer.Option(help="Simulated studies a row.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the simulations.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the table here as Markdown.")] = None,
    as_json: Json = False,
) -> None:
    """Measure how often the 95 % intervals hold, on simulated studies (makes docs/coverage.md)."""
    from ditscale.scaling.coverage import coverage_table

    table = coverage_table(draws=draws, seed=seed)
    if out is not None:
        out.write_text(table.to_markdown(), encoding="utf-8")
    _print(table, as_json)


_COLUMNS = (
    *("params", "tokens", "images", "flops", "loss", "budget"),
    *("tokens_from_6nd", "drop_highest", "where", "last_step", "pool"),
)


def _columns(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a command's arguments that say how a table is read."""
    return {name: arguments[name] for name in _COLUMNS if name in arguments}


def _runs(arguments: Mapping[str, Any]) -> RunTable:
    """The table of a command's ``file``, read as its arguments say."""
    return _table(arguments["file"], **_columns(arguments))


def _table(file: Path, **options: Any) -> RunTable:
    from ditscale.scaling.runs import RunTable

    return RunTable.read(file, **options)


def _pairs(options: list[str] | None) -> dict[str, str]:
    from ditscale.errors import InputError

    pairs = {}
    for option in options or []:
        name, separator, column = option.partition("=")
        if not separator:
            raise InputError(f"input: expected NAME=COLUMN, got {option!r}")
        pairs[name] = column
    return pairs


def _print(result: Any, as_json: bool) -> None:
    if as_json:
        from ditscale.scaling.jsonable import dumps

        typer.echo(dumps(result.to_json()))
        return
    from rich.console import Console

    Console(soft_wrap=True, highlight=True, markup=False).print(result.summary())
