"""Studies: the design, the folder, and a whole study that is killed and ends as if it had not been."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from ditscale.dit import DDPM, DiT, DiTConfig, sampling
from ditscale.dit.data import emoji_vocabulary
from ditscale.dit.flops import count
from ditscale.dit.training import TrainConfig
from ditscale.dit.weights import save_weights
from ditscale.errors import InputError
from ditscale.scaling import conduct
from ditscale.scaling.demo_study import demo_study
from ditscale.scaling.gallery import draw_gallery
from ditscale.scaling.study import Study, StudyConfig, design, plan_run


def small(**changes):
    """A study of seconds: tiny pictures' worth of compute, all the stages."""
    settings = {
        "name": "small",
        "budgets": (3_000_000_000, 8_000_000_000, 20_000_000_000),
        "target": 60_000_000_000,
        "sizes": 4,
        "span": 6.0,
        "prior_coefficient": 0.36,
        "prior_exponent": 0.47,
        "head_width": 8,
        "widths": (8, 12, 16, 20, 24, 28, 32, 40),
        "depth": 3,
        "model": {
            "image_size": 32, "latent_factor": 1, "in_channels": 3, "patch": 8, "condition": "caption",
            "vocabulary_size": len(emoji_vocabulary()), "learn_sigma": False, "mup_base_width": 64,
        },
        "training": {"batch": 16, "lr": 5e-3, "prediction": "clean", "evaluation_images": 32},
    }  # fmt: skip
    return StudyConfig(**{**settings, **changes})


def test_every_budget_is_spent_around_the_prior():
    config = small()
    grid = design(config)
    assert len(grid) == 12
    for budget in config.budgets:
        runs = [run for run in grid if run.budget == budget]
        sizes = [run.params_per_token for run in runs]
        assert len(set(sizes)) == 4 and min(sizes) < config.optimum(budget) < max(sizes)
        for run in runs:
            # Whole batches: under the budget by less than one.
            step = 16 * count(config.size(run.training["model"]["width"])).train
            assert 0 <= budget - run.flops < step
            assert run.steps * 16 == run.images


def test_the_demo_s_design_keeps_its_promises():
    config = demo_study()
    grid = design(config)
    assert len(config.budgets) >= 4 and config.budgets[-1] >= 30 * config.budgets[0]
    assert config.target >= 10 * config.budgets[-1]
    centres = []
    for budget in config.budgets:
        sizes = [run.params_per_token for run in grid if run.budget == budget]
        assert len(sizes) >= 5
        centres.append((min(sizes) * max(sizes)) ** 0.5 / config.optimum(budget))
    # Around the common prior at every budget: a grid that drifts bends the exponent.
    assert max(centres) / min(centres) < 1.5
    assert {run.training["seed"] for run in grid} == {0}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"budgets": (1e9, 2e9)}, "budgets"),
        ({"budgets": (1e9, -2e9, 3e9)}, "budgets"),
        ({"budgets": (3e9, 2e9, 1e9)}, "budgets"),
        ({"target": 1e9}, "target"),
        ({"sizes": 3}, "sizes"),
        ({"sizes": 10**26}, "sizes"),
        ({"span": 0.5}, "span"),
        ({"widths": (16, 8)}, "widths"),
        ({"workers": 0}, "workers"),
        ({"name": 3}, "name"),
        ({"budgets": 1e9}, "budgets"),
        ({"budgets": ("a", "b", "c")}, "budgets"),
        ({"budgets": (10**400, 10**401, 10**402)}, "budgets"),
        ({"widths": 8}, "widths"),
        ({"widths": (True, 8)}, "widths"),
        ({"depth": 0}, "depth"),
        ({"depth": 1.5}, "depth"),
        ({"model": 3}, "model: expected a table"),
        ({"training": [1]}, "training: expected a table"),
        ({"execution": "x"}, "execution: expected a table"),
        ({"lr_exponent": 0.25}, "lr_images: expected the images"),
        ({"lr_images": 0}, "lr_images: expected a positive"),
        ({"lr_images": "many"}, "lr_images: expected a positive"),
        ({"lr_images": 1000, "lr_exponent": 3}, "lr_exponent"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_impossible_studies_are_named(change, named):
    with pytest.raises(InputError, match=named):
        small(**change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"execution": {"data_worker": 2}}, "execution.data_worker: no such field"),
        ({"execution": {"compile": "x"}}, "execution.compile: expected one of false, true"),
        *(({"training": {name: 3}}, f"training.{name}: expected none") for name in ("model", "flops", "images")),
    ],
    ids=str,
)
def test_what_only_a_run_would_notice_is_named_before_a_folder_is_bound_to_it(tmp_path, change, named):
    with pytest.raises(InputError, match=named):
        Study.create(tmp_path, small(**change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", [{"prior_exponent": 1e9}, {"prior_exponent": 3.0}, {"prior_coefficient": 1e12}])
def test_a_prior_that_asks_for_endless_widths_is_named(change):
    with pytest.raises(InputError, match="prior_exponent"):
        design(small(**change))


def test_rates_follow_the_length_of_a_run(tmp_path):
    assert {run.training["lr"] for run in design(small())} == {5e-3}
    study = Study.create(tmp_path, small(lr_images=2000, lr_exponent=0.25))
    for run in study.grid:
        factor = (run.images / 2000) ** -0.25
        assert run.training["lr"] == pytest.approx(5e-3 * factor, rel=1e-3)
        assert run.training["muon_lr"] == pytest.approx(TrainConfig.muon_lr * factor, rel=1e-3)
    assert len({run.training["lr"] for run in study.grid}) > len(study.grid) / 2
    # The plan names the rate that the rule starts from, and the same study is known again.
    assert study.plan["training"]["lr"] == 5e-3 and study.plan["training"]["muon_lr"] == TrainConfig.muon_lr
    assert Study.create(tmp_path, small(lr_images=2000, lr_exponent=0.25)).grid == study.grid
    with pytest.raises(InputError, match="another study"):
        Study.create(tmp_path, small(lr_images=2000, lr_exponent=0.3))


def test_a_study_from_before_a_field_existed_is_known_again(tmp_path):
    Study.create(tmp_path, small())
    plan = json.loads((tmp_path / "study.json").read_text())
    del plan["config"]["lr_images"], plan["config"]["lr_exponent"]
    (tmp_path / "study.json").write_text(json.dumps(plan))
    assert Study.create(tmp_path, small()).grid == design(small())


def test_a_budget_too_small_for_its_models_is_named():
    with pytest.raises(InputError, match="budgets: expected enough for 20 steps"):
        design(small(budgets=(10**8, 6 * 10**9, 18 * 10**9), prior_exponent=0.02, prior_coefficient=2e4))


def test_budgets_that_would_be_taken_for_one_are_refused():
    with pytest.raises(InputError, match="^budgets: expected each at least 1.3 times the one before"):
        small(budgets=(6 * 10**9, 7 * 10**9, 18 * 10**9))


def test_a_folder_becomes_the_study_of_the_first_of_two_calls(tmp_path, monkeypatch):
    def overtaken(config):
        if config == small():
            Study.create(tmp_path, small(name="other"))
        return design(config)

    monkeypatch.setattr("ditscale.scaling.study.design", overtaken)
    with pytest.raises(InputError, match="got another study's"):
        Study.create(tmp_path, small())
    assert Study(tmp_path).config.name == "other"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes\.txt"):
        Study.create(tmp_path, small())
    Study.create(tmp_path / "study", small())
    with pytest.raises(InputError, match="another study"):
        Study.create(tmp_path / "study", small(seed=1))
    assert Study.create(tmp_path / "study", small()).config == small()
    whole = json.loads((tmp_path / "study/study.json").read_text())
    for damage in ([], {"grid": 3}, whole | {"grid": []}, whole | {"config": "x"}, whole | {"grid": ["x"]}):
        (tmp_path / "study/study.json").write_text(json.dumps(damage))
        with pytest.raises(InputError, match=r"study\.json"):
            Study(tmp_path / "study")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("prediction.json", [], "law_sha256"),
        ("prediction.json", {"law_sha256": "0"}, "width"),
        ("outcome.json", {"predicted_loss": 1.0}, "interval_95"),
        ("clock.json", {"seconds": "long"}, "seconds"),
        ("clock.json", 3, "seconds"),
    ],
)
def test_a_damaged_stage_is_named_and_left_as_it_is(tmp_path, name, content, named):
    (tmp_path / "laws.json").write_text("{}")
    path = tmp_path / name
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"{name}.*{named}"):
        if name == "prediction.json":
            conduct._predict(argparse.Namespace(folder=tmp_path), tmp_path / "laws.json", {})
        elif name == "outcome.json":
            conduct._settle(argparse.Namespace(folder=tmp_path), {}, None, None)
        else:
            conduct._Clock(path)
    assert json.loads(path.read_text()) == content


def test_a_clock_that_cannot_be_written_stops_no_study(tmp_path):
    (tmp_path / "gone").mkdir()
    clock = conduct._Clock(tmp_path / "gone" / "clock.json")
    (tmp_path / "gone").rmdir()
    clock.save()
    (tmp_path / "gone").mkdir()
    clock.save()
    assert conduct._Clock(clock.path).before > 0.0


def test_laws_that_a_prediction_was_made_from_stay(tmp_path, monkeypatch):
    """The same fit on another kind of processor differs by rounding, and that of other runs by more; neither replaces them."""
    study = Study.create(tmp_path / "study", small())
    law = {"coefficient": 2.0, "exponent": 0.4}
    laws = {"N_opt": law, "D_opt": law, "loss": {"band": {"value": [0.2, 0.1]}}}
    target = plan_run(study.config, study.config.size(24), study.config.target, "prediction")
    trained = []

    class Reached(Exception):
        pass

    def execute(study, runs, engine, **_):
        trained.append(len(runs))
        if runs == [target]:
            raise Reached

    monkeypatch.setattr(conduct, "open_engine", lambda *args, **told: None)
    monkeypatch.setattr(conduct, "execute", execute)
    monkeypatch.setattr(conduct, "choose_and_predict", lambda study: (target, {"loss": 0.1, "interval_95": [0.1, 0.2]}))

    def carry_out(laws):
        monkeypatch.setattr(conduct, "fit_laws", lambda study: laws)
        conduct.conduct(study, show=lambda *args: None, say=print)

    with pytest.raises(Reached):
        carry_out(laws)
    written = [(study.folder / f"{name}.json").read_bytes() for name in ("laws", "prediction")]
    with pytest.raises(Reached):
        carry_out(laws | {"N_opt": law | {"exponent": 0.4 + 1e-12}})
    with pytest.raises(InputError, match=r"laws\.json: expected the laws of the runs that are here.*prediction\.json"):
        carry_out(laws | {"N_opt": law | {"exponent": 0.4 + 1e-5}})
    assert trained == [12, 1, 12, 1, 12]
    assert written == [(study.folder / f"{name}.json").read_bytes() for name in ("laws", "prediction")]


def test_a_prediction_is_not_made_after_its_run(tmp_path):
    study = Study.create(tmp_path / "study", small())
    record = {"run_id": "one", "status": "finished", "loss": 0.1, "flops": 1, "role": "prediction"}
    study.run_folder("one").mkdir(parents=True)
    (study.run_folder("one") / "run.json").write_text(json.dumps(record))
    (study.folder / "laws.json").write_text("{}")
    with pytest.raises(InputError, match=r"prediction\.json: expected the prediction that run one was made to test"):
        conduct._predict(study, study.folder / "laws.json", {})
    assert not (study.folder / "prediction.json").exists()


LATENT = {"latent_factor": 8, "image_size": 256, "in_channels": 4, "learn_sigma": False}
VIDEO = {"latent_factor": 1, "image_size": 16, "in_channels": 3, "frames": 2, "learn_sigma": False}


@pytest.mark.parametrize("model", [LATENT, VIDEO], ids=["latent", "video"])
def test_a_gallery_draws_every_model_it_can(tmp_path, model):
    model = DiTConfig(condition="none", patch=4, width=16, depth=1, heads=2, **model)
    data = "emoji_clips" if model.is_video else "emoji_scenes"
    training = TrainConfig(model=model, data=data, images=16).to_dict()
    run = argparse.Namespace(run_id="one", budget=1, training=training)
    save_weights(
        tmp_path / "weights.safetensors",
        dict(DiT(model).named_parameters()),
        model,
        TrainConfig(model=model, images=16).flow,
    )
    study = argparse.Namespace(
        config=argparse.Namespace(budgets=(1,), seed=0, execution={}), grid=[run], run_folder=lambda run_id: tmp_path
    )
    draw_gallery(study, run)
    # Nothing here makes pictures of latents; that is no reason to lose the study's end.
    assert (tmp_path / "samples.png").exists() == (model.latent_factor == 1)


def test_a_gallery_clips_ddpm_on_pixels_as_samples_are(tmp_path, monkeypatch):
    drawn, draw = [], sampling.draw_samples
    monkeypatch.setattr(sampling, "draw_samples", lambda *args, **told: drawn.append(draw(*args, **told)) or drawn[0])
    size = {"image_size": 16, "latent_factor": 1, "in_channels": 3, "learn_sigma": False}
    model = DiTConfig(condition="none", patch=4, width=16, depth=1, heads=2, **size)
    training = TrainConfig(model=model, images=16, objective=DDPM(learn_sigma=False))
    save_weights(tmp_path / "weights.safetensors", dict(DiT(model).named_parameters()), model, training.flow)
    run = argparse.Namespace(run_id="one", budget=1, training=training.to_dict())
    study = argparse.Namespace(
        config=argparse.Namespace(budgets=(1,), seed=0, execution={}), grid=[run], run_folder=lambda run_id: tmp_path
    )
    draw_gallery(study, run)
    assert float(drawn[0].abs().max()) <= 1.001


def test_toml_reads_back(tmp_path):
    text = "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in dataclasses.asdict(small()).items()
        if not isinstance(value, dict) and value is not None
    )  # fmt: skip
    for table in ("model", "training"):
        text += f"\n[{table}]\n" + "\n".join(f"{k} = {json.dumps(v)}" for k, v in getattr(small(), table).items())
    (tmp_path / "study.toml").write_text(text)
    assert StudyConfig.from_toml(tmp_path / "study.toml") == small()
    (tmp_path / "study.toml").write_text(text + "\nepochs = 3\n")
    with pytest.raises(InputError, match="training.epochs"):
        design(StudyConfig.from_toml(tmp_path / "study.toml"))
    (tmp_path / "study.toml").write_text("epochs = 3\n" + text)
    with pytest.raises(InputError, match="epochs"):
        StudyConfig.from_toml(tmp_path / "study.toml")


PROGRAM = """
import json, sys
from ditscale.scaling.study import Study
from ditscale.scaling.conduct import conduct
if __name__ == "__main__":
    print("ready", flush=True)
    study = Study(sys.argv[1])
    conduct(study, show=lambda stage, progress=None: None, say=lambda sentence: print(sentence, flush=True))
"""


def conduct_in_a_process(folder, program):
    return subprocess.Popen([sys.executable, str(program), str(folder)], stdout=subprocess.PIPE, text=True)


def timeless(value):
    """A record without what clocks and hashes of clocks put into it."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "second" not in k and not k.endswith("_at")}
    return value


@pytest.mark.slow
def test_a_study_that_is_killed_ends_as_if_it_had_not_been(tmp_path):
    program = tmp_path / "conduct.py"
    program.write_text(PROGRAM)
    results = []
    for name, delays in (("whole", ()), ("killed", (4.0, 8.0))):
        folder = tmp_path / name
        Study.create(folder, small())
        for delay in delays:
            process = conduct_in_a_process(folder, program)
            process.stdout.readline()
            time.sleep(delay)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        process = conduct_in_a_process(folder, program)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        content = {p.parent.name: timeless(json.loads(p.read_text())) for p in folder.glob("runs/*/run.json")}
        for stage in ("laws", "prediction", "outcome"):
            content[stage] = timeless(json.loads((folder / f"{stage}.json").read_text()))
        # What the prediction's hash is of: not a clock in it.
        content["law bytes"] = (folder / "laws.json").read_bytes()
        weights = {p.parent.name: p.read_bytes() for p in folder.glob("runs/*/weights.safetensors")}
        results.append((content, weights))
        assert (folder / "report.html").exists() and (folder / "runs.csv").exists()
        prediction = json.loads((folder / "prediction.json").read_text())
        record = json.loads((folder / "runs" / prediction["run_id"] / "run.json").read_text())
        assert prediction["made_at"] <= record["started_at"]
    assert results[0] == results[1]


def test_where_a_study_is_trained_is_no_part_of_it(tmp_path):
    study = Study.create(tmp_path / "study", small())
    moved = Study.create(tmp_path / "study", small(engine="slurm", engine_options={"slurm_partition": "gpu"}))
    assert moved.config.engine == "slurm" and moved.grid == study.grid
    other = {"execution": {"checkpoint_seconds": 1.0}, "workers": 3, "threads": 2}
    assert Study.create(tmp_path / "study", small(**other)).grid == study.grid
    with pytest.raises(InputError, match="execution.data_worker: no such field"):
        Study.create(tmp_path / "study", small(execution={"data_worker": 2}))
    assert Study(tmp_path / "study").config == small(**other), "who runs the folder runs what it was opened with last"
    with pytest.raises(InputError, match="another study's"):
        Study.create(tmp_path / "study", small(seed=1))
    with pytest.raises(InputError, match="engine: expected one of local, slurm, ray, got 'k8s'"):
        small(engine="k8s")
    with pytest.raises(InputError, match="engine_options: expected none for the local engine, got num_gpus"):
        small(engine_options={"num_gpus": 1})
