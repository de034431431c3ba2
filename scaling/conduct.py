"""Carry a study out from the grid to the page: train, fit, predict, train the predicted run, compare.

Every stage leaves a file and is skipped where the file is there, so the same call goes on after any interruption:
runs/*/run.json, runs.csv, laws.json, prediction.json (before the large run starts), outcome.json, report.html.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ditscale.dit.files import folder_lock, read_json, write_json
from ditscale.errors import InputError
from ditscale.scaling.checks import need_least
from ditscale.scaling.execute import Progress, execute, open_engine
from ditscale.scaling.jsonable import plain
from ditscale.scaling.outlook import choose_and_predict, fit_laws
from ditscale.scaling.study import PlannedRun, Study, plan_run

# What is told of an outcome at the end.
_OUTCOME = (
    *("predicted_loss", "interval_95", "measured_loss", "relative_error", "inside_interval"),
    *("extrapolation_factor", "flops_spent", "seconds"),
)
# Fits of the same runs with OpenBLAS's kernels for two kinds of processor differed by 1e-7 at most; a run retrained to another
# loss moves them by more.
_ROUNDING = 1e-6

Show = Callable[[str, "Progress | None"], None]


def conduct(
    study: Study,
    *,
    show: Show,
    say: Callable[[str], None],
    engine: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Do all that a study still lacks.

    Args:
        study: what to carry out.
        show: called with (stage, progress of the runs or None).
        say: takes sentences that a person should see.
        engine: where the runs are trained: "local", "slurm" or "ray". Default: the study's.
        options: of the engine, before those of the study; see ``ditscale.scaling.execute.open_engine``. Default: none.

    Returns:
        The outcome, as in outcome.json.

    Raises:
        Interrupted: on Ctrl-C; the same call goes on.
        InputError: the folder is in use by another process, or a stage cannot be done.
    """
    with folder_lock(study.folder):
        clock = _Clock(study.folder / "clock.json")

        def tick(stage: str, progress: Progress | None = None) -> None:
            clock.save()
            show(stage, progress)

        config = study.config
        place = config.engine if engine is None else engine
        for complaint in study.records()[1]:
            say(f"{complaint}; its run is trained again")

        def train(runs: list[PlannedRun], workers: int, threads: int, stage: str) -> None:
            opened = open_engine(place, study, workers=workers, threads=threads, options=options)
            execute(study, runs, opened, show=lambda progress: tick(stage, progress), say=say)

        train(study.grid, config.workers, config.threads, "training the grid")
        study.write_table()

        tick("fitting the laws")
        laws = plain(fit_laws(study))
        laws_path = study.folder / "laws.json"
        # Laws that a prediction was made from are its evidence: they stay, whatever the same fit gives by now.
        promised = (study.folder / "prediction.json").exists()
        if not laws_path.exists() or not (promised or read_json(laws_path) == laws):
            write_json(laws_path, laws)
        prediction, target = _predict(study, laws_path, laws)

        # One process with all the threads: it is a single run, and the largest.
        train([target], 1, config.workers * config.threads, "training the predicted run")
        study.write_table()
        tick("drawing samples and the page")
        from ditscale.scaling.gallery import draw_gallery

        draw_gallery(study, target)
        outcome = _settle(study, prediction, target, clock)
        from ditscale.scaling.report import write_report

        write_report(study.folder)
        return outcome


def _predict(study: Study, laws_path: Path, laws: Mapping[str, Any]) -> tuple[dict[str, Any], PlannedRun]:
    """The prediction, written once and before its run, and the run that it is about. ``laws`` are those of the runs by now."""
    path = study.folder / "prediction.json"
    law_hash = hashlib.sha256(laws_path.read_bytes()).hexdigest()
    if path.exists():
        prediction = _read(path, "law_sha256", "width", "loss", "interval_95", "budget", "params", "images")
        if prediction["law_sha256"] != law_hash:
            raise InputError(
                f"{path}: expected the prediction of the law {law_hash[:12]} in laws.json, got one of "
                f"{str(prediction['law_sha256'])[:12]}; a prediction is not made twice: use a new folder"
            )
        if not _same_laws(read_json(laws_path), laws):
            raise InputError(
                f"{laws_path}: expected the laws of the runs that are here, got those of others, which {path.name} was made "
                "from; a prediction is not made twice: use a new folder"
            )
        model = study.config.size(prediction["width"])
        return prediction, plan_run(study.config, model, study.config.target, "prediction")
    if made := [record["run_id"] for record in study.records()[0] if record.get("role") == "prediction"]:
        raise InputError(
            f"{path}: expected the prediction that run {made[0]} was made to test, got none; a prediction is not made after "
            "its run: use a new folder"
        )
    target, predicted = choose_and_predict(study)
    model = target.training["model"]
    prediction = {
        "budget": study.config.target,
        "params": target.params,
        "params_per_token": target.params_per_token,
        "images": target.images,
        "steps": target.steps,
        "width": model["width"],
        "depth": model["depth"],
        "run_id": target.run_id,
        **plain(predicted),
        "made_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "law_sha256": law_hash,
        "sha256": law_hash,
    }
    write_json(path, prediction)
    return prediction, target


def _same_laws(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two fits differ by rounding at most, as those of one study do on processors of two kinds."""

    def numbers(laws: Mapping[str, Any]) -> list[float]:
        powers = [float(laws[name][part]) for name in ("N_opt", "D_opt") for part in ("coefficient", "exponent")]
        return [*powers, *laws["loss"]["band"]["value"]]

    one, other = numbers(before), numbers(now)
    return len(one) == len(other) and bool(np.allclose(one, other, rtol=_ROUNDING, atol=0.0))


def _settle(study: Study, prediction: dict[str, Any], target: PlannedRun, clock: _Clock) -> dict[str, Any]:
    """Compare, and write the outcome once."""
    path = study.folder / "outcome.json"
    if path.exists():
        return _read(path, *_OUTCOME)
    records = {record["run_id"]: record for record in study.records()[0]}
    measured = records[target.run_id]["loss"]
    if measured is None:
        raise InputError(f"{target.run_id}: expected the predicted run to train, got one whose loss diverged")
    low, high = prediction["interval_95"]
    spent = [records[run.run_id]["flops"] for run in [*study.grid, target]]
    outcome = {
        "budget": prediction["budget"],
        "params": prediction["params"],
        "images": prediction["images"],
        "predicted_loss": prediction["loss"],
        "interval_95": [low, high],
        "measured_loss": measured,
        "relative_error": measured / prediction["loss"] - 1,
        "inside_interval": low <= measured <= high,
        "extrapolation_factor": records[target.run_id]["flops"] / max(study.config.budgets),
        "flops_spent": sum(spent),
        "flop_convention": study.plan["flop_convention"],
        "seconds": clock.seconds(),
    }
    write_json(path, outcome)
    return outcome


def _read(path: Path, *fields: str) -> dict[str, Any]:
    """A stage's file; InputError where it is damaged."""
    content = read_json(path)
    missing = [name for name in fields if not isinstance(content, dict) or name not in content]
    if missing:
        raise InputError(f"{path}: expected the field {missing[0]!r}, got a damaged file without it")
    return dict(content)


class _Clock:
    """Wall time spent on a study over all its sessions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = 0.0
        if path.exists():
            self.before = need_least(f"{path}: seconds", _read(path, "seconds")["seconds"])
        self.start = self.saved = time.monotonic()

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.start

    def save(self) -> None:
        if time.monotonic() - self.saved > 2.0 or not self.path.exists():
            self.saved = time.monotonic()
            with contextlib.suppress(InputError):  # on a full disk the runs go on, which say it; so does their clock
                write_json(self.path, {"seconds": self.seconds()})
