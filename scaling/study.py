"""Design an isoFLOP study from the exact ledger, and know its folder.

A study trains several sizes of one DiT at each of several FLOP budgets (approach 2 of Hoffmann et al., arXiv:2203.15556;
for diffusion transformers Liang et al., arXiv:2410.08184). The sizes stand around one prior law at every budget, so the
grid does not drift off centre as the budget grows, which would bend the fitted exponent (arXiv:2603.22339).

The path of the data: StudyConfig -> design() -> Study folder (study.json) -> execute.py (runs/*/run.json, runs.csv) ->
outlook.py (laws.json, prediction.json, outcome.json) -> report.py (report.html).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ditscale.dit.checks import is_number
from ditscale.dit.config import DiTConfig, read_toml
from ditscale.dit.files import folder_lock, read_json, write_atomically, write_json
from ditscale.dit.flops import CONVENTION, count
from ditscale.errors import InputError
from ditscale.scaling.checks import need_whole
from ditscale.scaling.configurations import counted
from ditscale.scaling.jobs import ENGINES, read_record

SCHEMA = 1
# Runs are told apart by the compute that they took (see ``runs.cluster_budgets``): 1.25 times, and what whole steps make of it.
_APART = 1.3
# More widths than a study will ever choose from: a prior that asks for more is a slip of the pen.
_MOST_WIDTHS, _MOST_SIZES = 2_000, 100
# The fields that say where and how a study is carried out.
_PLACE = ("execution", "workers", "threads", "engine", "engine_options")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What a study trains.

    Args:
        name: for people.
        budgets: training FLOPs of each fitted budget (convention ``matmul``), at least 3, rising.
        target: FLOPs of the run that is predicted before it is trained, above the largest budget.
        sizes: models at each budget, at least 4. Default: 5.
        span: largest over smallest parameter count at a budget. Default: 8.
        prior_coefficient, prior_exponent: the prior law of the best per-token parameter count,
            ``coefficient * C ** exponent``, around which the sizes stand.
        widths: model widths to choose from, rising; from the last on they go on in steps of its distance to the one
            before. Default: multiples of ``head_width``.
        head_width: width of a head, as near as a divisor of the model's width allows. Default: 16.
        depth: blocks of every model, or None for one block per ``aspect`` of width. Default: None.
        aspect: width over depth where ``depth`` is None. Default: 64.
        model: fields of :class:`DiTConfig` that all sizes share.
        training: fields of the trainer's configuration that all runs share; not its ``model``, ``flops`` and ``images``,
            which the study decides for each.
        lr_images, lr_exponent: a run of D images trains at ``training.lr * (D / lr_images) ** -lr_exponent``, and so does
            Muon's rate: the best rate falls with the length of a run (Bjorck et al. 2024, arXiv:2409.19913, found an
            exponent near 0.32 for language models), and a rate that suits one end of a study bends its law at the
            other. Default: every run has the same rate.
        execution: fields of ``ditscale.dit.training.Execution``: how each run is carried out. Like all fields from here to
            ``engine_options`` no part of what the study is. Default: none.
        workers: processes that train at once. Default: 2.
        threads: threads of each. Default: 1.
        engine: where the runs are trained, "local", "slurm" or "ray". Default: "local".
        engine_options: of "slurm" (submitit's parameters) or "ray" (its address, a task's resources). Default: none.
        seed: of the study. Default: 0.

    Raises:
        InputError: a value is not possible; names it, what was expected and what came.
    """

    name: str
    budgets: tuple[int, ...]
    target: int
    sizes: int = 5
    span: float = 8.0
    prior_coefficient: float
    prior_exponent: float
    widths: tuple[int, ...] = ()
    head_width: int = 16
    depth: int | None = None
    aspect: float = 64.0
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    lr_images: float | None = None
    lr_exponent: float = 0.0
    execution: Mapping[str, Any] = field(default_factory=dict)
    workers: int = 2
    threads: int = 1
    engine: str = "local"
    engine_options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"name: expected a text, got {self.name!r}")
        for name in ("model", "training", "execution", "engine_options"):
            if not isinstance(getattr(self, name), Mapping):
                raise InputError(f"{name}: expected a table of fields, got {getattr(self, name)!r}")
        budgets = self.budgets
        if not _rises(budgets, 3, lambda b: is_number(b) and b > 0):
            raise InputError(f"budgets: expected at least 3 positive FLOP counts, rising, got {budgets!r}")
        if any(later < _APART * before for before, later in zip(budgets, budgets[1:], strict=False)):
            raise InputError(
                f"budgets: expected each at least {_APART} times the one before, or their runs are taken for runs of one "
                f"budget, got {budgets!r}"
            )
        object.__setattr__(self, "budgets", tuple(int(b) for b in budgets))
        if not is_number(self.target) or self.target <= budgets[-1]:
            raise InputError(
                f"target: expected more FLOPs than the largest budget {budgets[-1]:.4g}, got {self.target!r}"
            )
        object.__setattr__(self, "target", int(self.target))
        need_whole("sizes", self.sizes, 4, _MOST_SIZES)
        for name, least in (("head_width", 1), ("workers", 1), ("threads", 1), ("seed", 0)):
            need_whole(name, getattr(self, name), least)
        if self.engine not in ENGINES:
            raise InputError(f"engine: expected one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.engine == "local" and self.engine_options:
            raise InputError(
                f"engine_options: expected none for the local engine, got {next(iter(self.engine_options))}"
            )
        if self.depth is not None and not _is_count(self.depth):
            raise InputError(f"depth: expected a whole number of at least 1, or none, got {self.depth!r}")
        widths = self.widths
        if widths not in ((), []) and not _rises(widths, 2, _is_count):
            raise InputError(f"widths: expected at least 2 whole numbers, rising, or none, got {widths!r}")
        object.__setattr__(self, "widths", tuple(widths))
        for name, above in (("span", 1.0), ("prior_coefficient", 0.0), ("prior_exponent", 0.0), ("aspect", 0.0)):
            value = getattr(self, name)
            if not is_number(value) or value <= above:
                raise InputError(f"{name}: expected a number above {above:g}, got {value!r}")
        if not is_number(self.lr_exponent) or not -1.0 <= self.lr_exponent <= 1.0:
            raise InputError(f"lr_exponent: expected a number from -1 to 1, got {self.lr_exponent!r}")
        if self.lr_images is None and self.lr_exponent:
            raise InputError("lr_images: expected the images of a run that trains at training.lr, got none")
        if self.lr_images is not None and (not is_number(self.lr_images) or self.lr_images <= 0):
            raise InputError(f"lr_images: expected a positive number of images, got {self.lr_images!r}")

    @classmethod
    def from_toml(cls, path: str | Path) -> StudyConfig:
        """Read a study from TOML: the fields at the top, ``[model]``, ``[training]``, ``[execution]`` as tables."""
        values = read_toml(path)
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"{path}: no field {unknown[0]!r} in a study (fields: {', '.join(sorted(known))})")
        required = ("name", "budgets", "target", "prior_coefficient", "prior_exponent")
        missing = [name for name in required if name not in values]
        if missing:
            raise InputError(f"{path}: expected the field {missing[0]!r} in a study, got none")
        return cls(**values)

    def size(self, width: int) -> DiTConfig:
        """The model of a width, with its depth and heads by the study's rule."""
        depth = self.depth if self.depth is not None else max(1, round(width / self.aspect))
        divisors = (h for h in range(1, width + 1) if width % h == 0)
        heads = min(divisors, key=lambda h: (abs(math.log(width / h / self.head_width)), h))
        return DiTConfig.from_dict({**self.model, "width": width, "depth": depth, "heads": heads})

    def ladder(self, most_params: float) -> list[DiTConfig]:
        """Every model of the study's family up to ``most_params`` per-token parameters, by rising size."""
        given = self.widths or (self.head_width, 2 * self.head_width)
        beyond = itertools.count(given[-1] + given[-1] - given[-2], given[-1] - given[-2])
        models: list[DiTConfig] = []
        for width in itertools.islice(itertools.chain(given, beyond), _MOST_WIDTHS):
            model = self.size(width)
            if count(model).params.per_token > most_params and models:
                return models
            models.append(model)
        raise InputError(
            f"prior_coefficient, prior_exponent: expected sizes within {_MOST_WIDTHS:,} widths, got {most_params:.3g} "
            f"parameters, which width {models[-1].width} does not have"
        )

    def nearest(self, params: float, kind: str = "per_token") -> DiTConfig:
        """The study's model whose number of parameters is nearest: those that work per token, or their "total"."""
        return min(self.ladder(2.0 * params), key=lambda model: abs(math.log(counted(model, kind) / params)))

    def rate(self, lr: float, images: float) -> float:
        """The learning rate of a run of so many images where ``lr`` is that of a run of ``lr_images``: four digits of it."""
        if self.lr_images is None:
            return lr
        return float(f"{lr * (images / self.lr_images) ** -self.lr_exponent:.4g}")

    def at(self, image_size: int) -> StudyConfig:
        """The same study of images of another size in pixels."""
        return dataclasses.replace(self, model={**self.model, "image_size": image_size})

    def optimum(self, budget: float) -> float:
        """The prior's best per-token parameter count at a budget."""
        try:
            return self.prior_coefficient * float(budget) ** self.prior_exponent
        except OverflowError:
            raise InputError(
                f"prior_exponent: expected a size that a model can have at {budget:.4g} FLOPs, got {self.prior_exponent!r}"
            ) from None


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study: which model, at which budget, for how many images."""

    run_id: str
    role: str
    budget: int
    training: dict[str, Any]
    params: int
    params_per_token: int
    images: int
    steps: int
    flops: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the columns that people look for on top."""
        model = self.training["model"]
        row = {"width": model["width"], "depth": model["depth"], "heads": model["heads"]}
        row |= {"batch": self.training["batch"], "lr": self.training["lr"]}
        return dataclasses.asdict(self) | row


def plan_run(config: StudyConfig, model: DiTConfig, budget: int, role: str) -> PlannedRun:
    """The run of ``model`` that spends ``budget``, whole batches only.

    Raises:
        InputError: the budget does not pay for the study's least number of steps.
    """
    from ditscale.dit.training import TrainConfig

    training = TrainConfig.from_dict({"seed": config.seed, **config.training, "model": model, "flops": budget})
    report = count(model)
    least = 20
    if training.steps < least:
        raise InputError(
            f"budgets: expected enough for {least} steps of batch {training.batch} of the model of width {model.width} "
            f"({least * training.batch * report.train:.4g} FLOPs), got {budget:.4g}"
        )
    images = training.steps * training.batch
    training = dataclasses.replace(
        training, lr=config.rate(training.lr, images), muon_lr=config.rate(training.muon_lr, images)
    )
    return PlannedRun(
        run_id=training.run_id,
        role=role,
        budget=budget,
        training=training.to_dict(),
        params=report.params.total,
        params_per_token=report.params.per_token,
        images=images,
        steps=training.steps,
        flops=images * report.train,
    )


def design(config: StudyConfig) -> list[PlannedRun]:
    """The grid of a study: at each budget ``sizes`` models, log-spaced over ``span`` around the prior's optimum.

    Raises:
        InputError: a budget is too small for its models, the family has too few sizes in the span, or a field of
            ``training`` or ``execution`` is not possible.
    """
    _check_tables(config)
    grid = []
    for budget in config.budgets:
        centre = config.optimum(budget)
        half = math.sqrt(config.span)
        ladder = config.ladder(centre * half * 2.0)
        sizes = [count(model).params.per_token for model in ladder]
        wanted = [centre * half ** (2 * i / (config.sizes - 1) - 1) for i in range(config.sizes)]
        picked: list[int] = []
        for n in wanted:
            left = [i for i in range(len(sizes)) if i not in picked]
            if left:
                picked.append(min(left, key=lambda i: abs(math.log(sizes[i] / n))))
        picked.sort()
        below = sum(sizes[i] < centre for i in picked)
        if len(picked) < config.sizes or below in (0, len(picked)):
            raise InputError(
                f"budgets: expected {config.sizes} different sizes around {centre:.3g} parameters at {budget:.4g} FLOPs, "
                f"got widths {[ladder[i].width for i in picked]}; more widths, a larger span or budget helps"
            )
        grid += [plan_run(config, ladder[i], budget, "fit") for i in picked]
    return grid


def _check_tables(config: StudyConfig) -> None:
    """InputError for what only a run would notice, or never: wrong fields of ``execution``, and of ``training`` those that
    the study decides."""
    from ditscale.dit.training import Execution

    Execution.from_dict(config.execution)
    for name in ("model", "flops", "images"):
        if name in config.training:
            raise InputError(f"training.{name}: expected none, as the study decides it, got {config.training[name]!r}")


def _without_place(config: StudyConfig) -> dict[str, Any]:
    """A study's fields, as JSON has them, without those that say where and how its runs are carried out."""
    fields = json.loads(json.dumps(dataclasses.asdict(config), default=dict))
    return {name: value for name, value in fields.items() if name not in _PLACE}


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _rises(values: Any, least: int, holds: Callable[[Any], bool]) -> bool:
    """Whether these are at least so many rising values for each of which this holds."""
    if not isinstance(values, (list, tuple)) or len(values) < least or not all(map(holds, values)):
        return False
    return list(values) == sorted(set(values))


class Study:
    """A study's folder: what was designed, and what has finished.

    Args:
        folder: holds study.json; see :meth:`create` for a new one.

    Raises:
        InputError: the folder holds no study, or a damaged one.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / "study.json"
        if not path.is_file():
            raise InputError(f"{self.folder}: expected a study's folder (with study.json), got none")
        self.plan = read_json(path)
        try:
            config = dict(self.plan["config"])
            self.config = StudyConfig(**config)
            self.grid = [
                PlannedRun(**{f.name: row[f.name] for f in dataclasses.fields(PlannedRun)}) for row in self.plan["grid"]
            ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: expected a study of schema {SCHEMA}, got a damaged one ({error})") from error
        if not self.grid:
            raise InputError(f"{path}: expected a study of schema {SCHEMA}, got one without runs")

    @classmethod
    def create(cls, folder: str | Path, config: StudyConfig) -> Study:
        """Make a study's folder, or open it again where it holds this very study; where and how its runs are carried out
        may be other than before, and is kept.

        Raises:
            InputError: the folder is not empty and holds something else, is in use, or cannot be written.
        """
        folder = Path(folder)
        path = folder / "study.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            present = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
        except OSError as error:
            raise InputError(f"{folder}: expected a folder to write to, got {error.strerror or error}") from error
        if present and not path.is_file():
            raise InputError(f"{folder}: expected an empty folder or a study's, got {present[0]!r} in it")
        designed = None if path.is_file() else _describe(config, design(config))
        # Of two calls at once, each of which found an empty folder, the later would take it from the other; and one that is
        # refused, as the study is being carried out, must not have changed it before.
        with folder_lock(folder):
            if designed is not None and not path.is_file():
                write_json(path, designed)
            study = cls(folder)
            if _without_place(study.config) != _without_place(config):
                raise InputError(f"{folder}: expected an empty folder or this study, got another study's")
            if study.config != config:
                _check_tables(config)
                study.config = config
                study.plan["config"] = dataclasses.asdict(config)
                write_json(path, study.plan)
            return study

    def run_folder(self, run_id: str) -> Path:
        """Where a run keeps its files."""
        return self.folder / "runs" / run_id

    def records(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The finished runs' records, and a sentence for every record that is damaged."""
        records, complaints = [], []
        for path in sorted((self.folder / "runs").glob("*/run.json")):
            try:
                records.append(read_record(path))
            except InputError as error:
                complaints.append(str(error))
        return records, complaints

    def fitted_records(self) -> list[dict[str, Any]]:
        """The finished runs of the grid, in its order."""
        by_id = {record["run_id"]: record for record in self.records()[0]}
        return [by_id[run.run_id] for run in self.grid if run.run_id in by_id]

    def write_table(self) -> Path:
        """Write runs.csv, every finished record with its losses by time in columns of their own."""
        rows = []
        for record in self.records()[0]:
            row = {k: v for k, v in record.items() if not isinstance(v, (dict, list))}
            for name, values in (("loss_t", record.get("loss_by_timestep")), ("t", record.get("timesteps"))):
                row |= {f"{name}{i}": value for i, value in enumerate(values or [])}
            row |= {f"version_{name}": value for name, value in record.get("versions", {}).items()}
            rows.append(row)
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        path = self.folder / "runs.csv"
        write_atomically(path, text.getvalue().encode())
        return path


def _describe(config: StudyConfig, grid: Sequence[PlannedRun]) -> dict[str, Any]:
    """The content of study.json: all that decides the study, and where it was designed."""
    from ditscale.dit.training import TrainConfig, versions

    # What all runs share: among it the rates of a run of `lr_images`, not those of the first run.
    training = TrainConfig.from_dict(
        {**grid[0].training, "lr": TrainConfig.lr, "muon_lr": TrainConfig.muon_lr, **config.training}
    )
    return {
        "schema": SCHEMA,
        "name": config.name,
        "config": dataclasses.asdict(config),
        "flop_convention": CONVENTION,
        "budgets": list(config.budgets),
        "target_budget": config.target,
        "seed": config.seed,
        "prior": {"coefficient": config.prior_coefficient, "exponent": config.prior_exponent, "of": "params_per_token"},
        "model": {**config.model, "head_width": config.head_width, "depth": config.depth, "aspect": config.aspect},
        "training": {k: v for k, v in training.to_dict().items() if k not in ("model", "flops", "images")},
        "grid": [run.to_dict() for run in grid],
        "versions": versions(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "workers": config.workers,
            "threads_per_worker": config.threads,
        },
    }
