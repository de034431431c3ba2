"""A study folder for tests of the page: designed and fitted by the real code, its runs made up.

Only the training is synthetic: losses come from a known surface with seeded noise. ``study.json``,
``laws.json`` and ``prediction.json`` come from the functions that write them in earnest, so the page meets
its real input.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

STAGES = ("designed", "running", "laws", "prediction", "outcome")
FLOOR, ALPHA, BETA = 0.215, 0.34, 0.42
_START = datetime.datetime(2026, 3, 14, 9, 26, 53, tzinfo=datetime.timezone.utc)


def write_study(folder: Path, *, seed: int = 0, noise: float = 0.004) -> Path:
    """Write a whole study, outcome included.

    Args:
        folder: an empty or missing folder.
        seed: of the made-up noise.
        noise: relative spread of a run's loss.

    Returns:
        ``folder``.
    """
    from ditscale.scaling.outlook import choose_and_predict, fit_laws
    from ditscale.scaling.study import Study

    study = Study.create(folder, study_config())
    truth = _Truth(study, np.random.default_rng(seed), noise)
    clock = _START
    for run in study.grid:
        clock = truth.write_run(run, clock)
    _write(folder / "laws.json", fit_laws(study))
    target, predicted = choose_and_predict(study)
    digest = hashlib.sha256((folder / "laws.json").read_bytes()).hexdigest()
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
        **predicted,
        "made_at": (clock + datetime.timedelta(seconds=4)).isoformat(timespec="seconds"),
        "law_sha256": digest,
        "sha256": digest,
    }
    _write(folder / "prediction.json", prediction)
    truth.write_run(target, clock + datetime.timedelta(seconds=5))
    study.write_table()
    for run in [*(r for r in study.grid if r.budget == max(study.config.budgets)), target]:
        truth.write_samples(run)
    record = json.loads((study.run_folder(target.run_id) / "run.json").read_text())
    low, high = prediction["interval_95"]
    outcome = {
        "budget": prediction["budget"],
        "params": prediction["params"],
        "images": prediction["images"],
        "predicted_loss": prediction["loss"],
        "interval_95": [low, high],
        "measured_loss": record["loss"],
        "relative_error": record["loss"] / prediction["loss"] - 1,
        "inside_interval": low <= record["loss"] <= high,
        "extrapolation_factor": record["flops"] / max(study.config.budgets),
        "flops_spent": sum(r.flops for r in [*study.grid, target]),
        "flop_convention": "matmul",
        "seconds": 743.2,
    }
    _write(folder / "outcome.json", outcome)
    return folder


def rewind(finished: Path, folder: Path, stage: str) -> Path:
    """Copy a finished study as it looked earlier.

    Args:
        finished: what :func:`write_study` wrote.
        folder: the copy; must not be there.
        stage: "designed" (nothing trained), "running" (a third of the runs, one of them half-way), "laws"
            (fitted, not predicted), "prediction" (its run half-way) or "outcome" (all of it).

    Returns:
        ``folder``.
    """
    shutil.copytree(finished, folder)
    level = STAGES.index(stage)
    for name, since in (("outcome", 4), ("prediction", 3), ("laws", 2)):
        if level < since:
            (folder / f"{name}.json").unlink()
    ids = [row["run_id"] for row in json.loads((folder / "study.json").read_text())["grid"]]
    target = next(path.name for path in sorted((folder / "runs").iterdir()) if path.name not in ids)
    trained = {"designed": 0, "running": len(ids) // 3}.get(stage, len(ids))
    half_way = ids[trained] if stage == "running" else target
    gone = ids[trained:] + ([target] if level < 4 else [])
    for run_id in gone:
        run = folder / "runs" / run_id
        if run_id != half_way or stage in ("designed", "laws"):
            shutil.rmtree(run, ignore_errors=True)
            continue
        for name in ("run.json", "samples.png", "samples.json"):
            (run / name).unlink(missing_ok=True)
        text = (run / "metrics.jsonl").read_text()
        # Killed in the middle of a line.
        (run / "metrics.jsonl").write_text(text[: len(text) // 2])
    return folder


def shared_study(tmp_path_factory: Any) -> Path:
    """A finished study, written once for all test files of a session; to be copied, not changed."""
    folder = Path(tmp_path_factory.getbasetemp()) / "page-study"
    return folder if (folder / "outcome.json").exists() else write_study(folder)


def study_config() -> Any:
    """A study much like the demo's, its own so that the demo may change."""
    from ditscale.dit.data import emoji_vocabulary
    from ditscale.scaling.study import StudyConfig

    return StudyConfig(
        name="emoji scenes",
        budgets=tuple(int(b) for b in (6e10, 2e11, 6e11, 2e12)),
        target=int(2e13),
        sizes=6,
        span=10.0,
        prior_coefficient=0.02,
        prior_exponent=0.55,
        head_width=4,
        depth=3,
        model={
            "image_size": 16,
            "latent_factor": 1,
            "in_channels": 3,
            "patch": 2,
            "condition": "caption",
            "vocabulary_size": len(emoji_vocabulary()),
            "learn_sigma": False,
        },
        training={"batch": 8, "lr": 6e-3},
    )


class _Truth:
    """``FLOOR + A N^-ALPHA + B D^-BETA``, its optimum on the study's prior law at the middle budget."""

    def __init__(self, study: Any, rng: np.random.Generator, noise: float) -> None:
        self.study, self.rng, self.noise = study, rng, noise
        budget = study.config.budgets[len(study.config.budgets) // 2]
        size = study.config.optimum(budget)
        nearest = min(study.grid, key=lambda run: abs(np.log(run.params_per_token / size)))
        images = budget / (nearest.flops / nearest.images)
        self.a = 0.09 * size**ALPHA
        self.b = 0.09 * ALPHA / BETA * images**BETA

    def loss(self, params: float, images: Any) -> Any:
        return FLOOR + self.a * params**-ALPHA + self.b * np.asarray(images, dtype=float) ** -BETA

    def write_metrics(self, run: Any) -> float:
        folder = self.study.run_folder(run.run_id)
        folder.mkdir(parents=True)
        every = max(1, run.steps // 200)
        lines, wobble, smoothed = [], 0.0, 1.31
        for step in range(every, run.steps + 1, every):
            images = step * run.images // run.steps
            wobble = 0.9 * wobble + 0.004 * float(self.rng.normal())
            # Before the rate decays a run stands a little above what it ends at.
            above = 1 + 0.06 * min(1.0, 2 * (1 - step / run.steps))
            target = (self.loss(run.params_per_token, images) ** -6 + 1.31**-6) ** (-1 / 6) * above
            smoothed = float(target) * (1 + wobble)
            line = {"step": step, "images": images, "flops": images * run.flops // run.images}
            lines.append(
                {
                    **line,
                    "train_loss": smoothed,
                    "lr": run.training["lr"] * min(1.0, 2 * (1 - step / run.steps)),
                }
            )
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return smoothed

    def write_run(self, run: Any, started: datetime.datetime) -> datetime.datetime:
        smoothed = self.write_metrics(run)
        row = run.to_dict()
        loss = float(self.loss(run.params_per_token, run.images)) * float(np.exp(self.noise * self.rng.normal()))
        times = np.linspace(1 / 16, 15 / 16, 8)
        shape = 0.45 + 2.2 * np.exp(-(((times - 0.08) / 0.16) ** 2)) + 0.8 * np.exp(-(((times - 0.97) / 0.12) ** 2))
        seconds = run.flops / (1.6e10 + 9e9 * np.tanh(row["width"] / 80))
        finished = started + datetime.timedelta(seconds=float(seconds))
        record = {
            **{
                k: row[k] for k in ("run_id", "role", "budget", "width", "depth", "heads", "params", "params_per_token")
            },
            **{k: row[k] for k in ("images", "steps", "batch", "lr", "flops")},
            "status": "finished",
            "flops_per_image": run.flops // run.images,
            "flop_convention": "matmul",
            "seed": 0,
            "loss": loss,
            "loss_kind": "velocity_mse",
            "loss_window": "final",
            "loss_by_timestep": (loss * shape / shape.mean()).tolist(),
            "timesteps": times.tolist(),
            "train_loss": smoothed,
            "objective": "rectified_flow_v",
            "data": "emoji_scenes",
            "data_sha256": "5a" * 32,
            "seconds": float(seconds),
            "images_per_second": run.images / float(seconds),
            "flops_per_second": run.flops / float(seconds),
            "device": "cpu",
            "threads": 1,
            "versions": self.study.plan["versions"],
            "started_at": started.isoformat(timespec="seconds"),
            "finished_at": finished.isoformat(timespec="seconds"),
        }
        _write(self.study.run_folder(run.run_id) / "run.json", record)
        # Two workers: the next run starts half a run later.
        return started + (finished - started) / 2

    def write_samples(self, run: Any) -> None:
        """Real held-out scenes, the more blurred the smaller the run."""
        from PIL import Image, ImageFilter

        from ditscale.dit.training import TrainConfig, open_stream

        plan = TrainConfig.from_dict(run.training)
        batch = open_stream(plan, "validation").batch(0, 8)
        side, gap = plan.model.image_size, 2
        sheet = Image.new("RGBA", (8 * (side + gap) - gap, side))
        blur = 2.2 * (3e4 / run.params_per_token) ** 0.6
        for i, pixels in enumerate(batch.images.transpose(0, 2, 3, 1)):
            rough = pixels.astype(float) + self.rng.normal(0, 60 * blur / 4, pixels.shape)
            tile = Image.fromarray(rough.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur / 2))
            sheet.paste(tile.convert("RGBA"), (i * (side + gap), 0))
        buffer = io.BytesIO()
        sheet.save(buffer, "PNG")
        folder = self.study.run_folder(run.run_id)
        (folder / "samples.png").write_bytes(buffer.getvalue())
        _write(
            folder / "samples.json",
            {"sampler": "heun", "steps": 20, "guidance": 2.0, "captions": list(batch.captions)},
        )


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))
