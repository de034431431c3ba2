"""What a run can be asked for: precision, recomputation, compilation, averages, validation and pictures on the way, sinks."""

from __future__ import annotations

import math
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_cases import metrics, result, stop_after, tiny, weights_of

from ditscale.dit.average import Profile, WeightAverage
from ditscale.dit.checkpoint import read_metrics
from ditscale.dit.commands import progress_bar, use_threads
from ditscale.dit.data import write_latents
from ditscale.dit.diffusion import DDPM
from ditscale.dit.files import read_json, write_atomically
from ditscale.dit.training import Execution, Stopped, TrainConfig, evaluation, loop, reconstruct, replay_step, train
from ditscale.dit.training.batches import Feeder
from ditscale.dit.update import Updater
from ditscale.dit.weights import load_weights
from ditscale.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_bfloat16_multiplies_in_bfloat16_and_keeps_its_weights_in_float32(tmp_path):
    seen = set()
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.add(output.dtype) if isinstance(module, torch.nn.Linear) else None
    )
    try:
        low = train(tiny(images=400, precision="bfloat16"), tmp_path / "low")
    finally:
        hook.remove()
    high = train(tiny(images=400), tmp_path / "high")
    assert torch.bfloat16 in seen
    assert low["precision"] == "bfloat16" and low["run_id"] != high["run_id"]
    assert low["loss"] == pytest.approx(high["loss"], rel=0.02) and low["loss"] != high["loss"]
    assert {p.dtype for p in load_weights(tmp_path / "low/weights.safetensors")[0].parameters()} == {torch.float32}


def test_no_loss_is_read_before_the_last_pass_of_a_step(tmp_path, monkeypatch):
    """Reading one waits for a GPU, which then idles until the next pass is launched."""
    order, config = [], tiny()
    item, backward = torch.Tensor.item, torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "item", lambda t: (order.append("read"), item(t))[1])
    monkeypatch.setattr(torch.Tensor, "backward", lambda t, *a, **k: (order.append("pass"), backward(t, *a, **k))[1])
    train(config, tmp_path / "run", execution=Execution(microbatch=config.batch // 2))
    steps = [i for i, what in enumerate(order) if what == "pass"]
    assert len(steps) == 2 * config.steps
    assert all(order[i + 1] == "pass" for i in steps[::2])


def test_recomputed_blocks_change_no_bit_and_are_charged(tmp_path):
    plain = train(tiny(), tmp_path / "plain")
    again = train(tiny(), tmp_path / "again", execution=Execution(recompute="block"))
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "again")
    assert again["recompute"] == "block" and again["flops"] == plain["flops"]
    assert plain["flops_hardware"] < again["flops_hardware"] < 2 * plain["flops_hardware"]
    with pytest.raises(Stopped):
        train(tiny(), tmp_path / "parts", should_stop=stop_after(4))
    parts = train(tiny(), tmp_path / "parts", execution=Execution(recompute="block"))
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "parts")
    assert plain["flops_hardware"] < parts["flops_hardware"] < again["flops_hardware"]


@pytest.mark.slow  # the compiler takes half a minute
# Dynamo looks at .grad of what is no leaf, and hides the warning unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_blocks_train_alike(tmp_path):
    plain = train(tiny(), tmp_path / "plain")
    compiled = train(tiny(), tmp_path / "compiled", execution=Execution(compile=True))
    assert compiled["compiled"] and compiled["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_power_averages_are_kept_and_give_any_width(tmp_path, monkeypatch):
    """The average put together from a run's folder is one that was tracked beside the training."""
    tracked = []
    apply = Updater.apply

    def watched(self, norm, rate):
        if not tracked:
            tracked.append(WeightAverage(self._parts, Profile("power", 0.08)))
        apply(self, norm, rate)
        tracked[0].update(list(self._parts.values()), self.updates)

    monkeypatch.setattr(Updater, "apply", watched)
    record = train(tiny(images=800, ema="power"), tmp_path)
    assert record["ema"] == "power" and len(list((tmp_path / "averages").iterdir())) == 2 * 16
    made = reconstruct(tmp_path, 0.08)
    direct = tracked[0].weights
    assert made.keys() == direct.keys()
    for name, tensor in direct.items():
        assert (made[name] - tensor).norm() <= 1e-3 * tensor.norm() + 1e-7, name
    kept = reconstruct(tmp_path, 0.05)
    model, _ = load_weights(tmp_path / "weights.safetensors")
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(kept[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match="kept averages"):
        reconstruct(tmp_path / "averages", 0.08)


def test_averages_of_no_update_are_not_kept_and_narrow_ones_are_found(tmp_path, monkeypatch):
    """One that an earlier version kept is passed over."""
    poisoned(monkeypatch, 0)
    said = []
    config = tiny(ema="power", ema_widths=[5e-5, 0.1], on_nonfinite="skip")
    train(config, tmp_path, say=said.append)
    kept = sorted(path.name for path in (tmp_path / "averages").iterdir())
    assert len(kept) == 2 * 11 and kept[0] == "step-000000001-width-0.1.safetensors"
    made = reconstruct(tmp_path, 0.07)
    zero = tmp_path / "averages/step-000000000-width-0.1.safetensors"
    zero.write_bytes((tmp_path / "averages" / kept[0]).read_bytes())
    again, narrow = reconstruct(tmp_path, 0.07), reconstruct(tmp_path, 5e-5)
    model, _ = load_weights(tmp_path / "weights.safetensors")  # of the first width
    for name, parameter in model.named_parameters():
        assert torch.equal(made[name], again[name]) and made[name].isfinite().all()
        torch.testing.assert_close(narrow[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    for step in (0, -3, 1.5):
        with pytest.raises(InputError, match="step: expected a whole number of at least 1"):
            reconstruct(tmp_path, 0.07, step=step)


def test_averages_that_cannot_be_written_are_said_once(tmp_path):
    run, said = tmp_path / "run", []

    def block(step, steps, loss):
        if step == 1:
            shutil.rmtree(run / "averages")
            (run / "averages").write_text("in the way")

    assert train(tiny(ema="power"), run, progress=block, say=said.append)["status"] == "finished"
    assert len(said) == 1 and said[0].startswith("average not kept (")


def test_a_fixed_decay_is_an_average_of_its_own(tmp_path):
    kept = train(tiny(ema="fixed", ema_decay=0.0), tmp_path / "none")
    slow = train(tiny(ema="fixed", ema_decay=0.999), tmp_path / "slow")
    assert kept["train_loss"] == slow["train_loss"] and kept["loss"] < slow["loss"]


def poisoned(monkeypatch, *steps):
    """Make an image of these steps NaN."""
    feed = Feeder.__call__

    def poison(self, step):
        inputs = feed(self, step)
        if step in steps:
            inputs.x_0[1, 0, 0, 0] = float("nan")
        return inputs

    monkeypatch.setattr(Feeder, "__call__", poison)


@pytest.mark.parametrize("step", [0, 5])
def test_a_run_that_meets_nan_stops_before_the_update_and_can_be_replayed(tmp_path, monkeypatch, step):
    poisoned(monkeypatch, step)
    said = []
    record = train(tiny(), tmp_path, say=said.append)
    assert record["status"] == "diverged" and record["loss"] is None and record["steps"] == step
    first = 4 * step
    assert f"step {step}, images {first} to {first + 3}, seed 0" in said[0] and "stopped before its update" in said[0]
    assert record["nonfinite"] == [
        {"step": step, "first_image": first, "images": 4, "seed": 0, "loss": "nan", "gradient_norm": "nan"}
    ]
    assert read_json(tmp_path / "run.json")["nonfinite_steps"] == 1
    shown = replay_step(tmp_path)
    assert shown["step"] == step and shown["first_image"] == first and shown["largest_weight"] < 100
    assert [loss != loss for loss in shown["losses"]] == [False, True, False, False]
    assert train(tiny(), tmp_path)["status"] == "diverged"  # a diverged run is done, too


def test_a_step_that_diverged_is_recorded_once_however_often_it_is_met(tmp_path, monkeypatch):
    """As when the disk was full for the record, or the process was killed before it."""
    poisoned(monkeypatch, 5)
    settle = loop.settle

    def full(folder, record):
        raise InputError(f"{folder}: no space")

    monkeypatch.setattr(loop, "settle", full)
    for _ in range(2):
        with pytest.raises(InputError, match="no space"):
            train(tiny(), tmp_path, say=lambda sentence: None)
    monkeypatch.setattr(loop, "settle", settle)
    record = train(tiny(), tmp_path, say=lambda sentence: None)
    assert record["nonfinite_steps"] == 1 and [event["step"] for event in record["nonfinite"]] == [5]


def test_skipping_goes_on_and_resumes_to_the_same_bits(tmp_path, monkeypatch):
    poisoned(monkeypatch, 0, 2, 7)
    said = []
    config = tiny(on_nonfinite="skip")
    whole = train(config, tmp_path / "whole", say=said.append)
    assert whole["status"] == "finished" and whole["steps"] == 12 and whole["nonfinite_steps"] == 3
    assert "step 2" in said[1] and "skipped" in said[1]
    for steps in (1, 4):
        with pytest.raises(Stopped):
            train(config, tmp_path / "parts", should_stop=stop_after(steps), say=said.append)
    assert result(train(config, tmp_path / "parts", say=said.append)) == result(whole)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")


def test_a_run_that_is_lost_is_given_up(tmp_path, monkeypatch):
    """However often it was stopped on the way."""
    poisoned(monkeypatch, *range(3, 100))
    config = tiny(images=400, on_nonfinite="skip")
    with pytest.raises(Stopped):
        train(config, tmp_path, should_stop=stop_after(15), say=lambda sentence: None)
    record = train(config, tmp_path, say=lambda sentence: None)
    assert record["status"] == "diverged" and record["steps"] == 23


def test_validation_on_the_way_changes_nothing_and_is_in_the_metrics(tmp_path):
    plain = train(tiny(), tmp_path / "plain")
    record = train(tiny(), tmp_path / "watched", execution=Execution(validate_every=5))
    assert weights_of(tmp_path / "plain") == weights_of(tmp_path / "watched")
    assert record["loss"] == plain["loss"]
    rows = {row["step"]: row for row in read_metrics(tmp_path / "watched/metrics.jsonl")}
    assert [step for step, row in rows.items() if "loss" in row] == [5, 10]
    assert len(rows[5]["loss_by_timestep"]) == 8 and rows[10]["loss"] > record["loss"] > 0
    assert rows[10]["loss"] == pytest.approx(sum(rows[10]["loss_by_timestep"]) / 8)


def test_pictures_are_drawn_on_the_way(tmp_path):
    train(tiny(evaluation_images=4), tmp_path, execution=Execution(sample_every=6))
    pictures = sorted((tmp_path / "samples").iterdir())
    assert [path.name for path in pictures] == ["step-000000006.png", "step-000000012.png"]
    with Image.open(pictures[0]) as first, Image.open(pictures[1]) as second:
        assert first.size == (34, 34) and first.tobytes() != second.tobytes()


def test_a_chain_shorter_than_a_picture_s_steps_is_walked_whole(tmp_path):
    config = tiny(images=8, evaluation_images=2, objective=DDPM(timesteps=10, learn_sigma=False))
    train(config, tmp_path, execution=Execution(sample_every=2))
    assert (tmp_path / "samples/step-000000002.png").exists()


def test_pictures_of_ddpm_on_pixels_are_clipped_as_samples_are(tmp_path, monkeypatch):
    """What little the network knows of the image at first is multiplied by the noise there, thousands for a cosine chain."""
    drawn, draw = [], evaluation.draw_samples
    monkeypatch.setattr(
        evaluation, "draw_samples", lambda *args, **told: drawn.append(draw(*args, **told)) or drawn[-1]
    )
    for objective in (DDPM(schedule="cosine", learn_sigma=False), None):
        train(tiny(images=4, objective=objective), tmp_path / str(objective), execution=Execution(sample_every=1))
    assert float(drawn[0].abs().max()) <= 1.001 < 2 < float(drawn[1].abs().max())


def test_channels_that_are_no_picture_are_named_before_the_first_step(tmp_path):
    write_latents(tmp_path / "data", [{"latents": np.ones((80, 4, 16, 16), np.float16)}], latent_factor=1)
    model = tiny().model.replace(in_channels=4, condition="none", vocabulary_size=0)
    with pytest.raises(
        InputError, match="execution.sample_every: expected 0 where there are no pictures, got 4 channels"
    ):
        train(tiny(model=model, data=str(tmp_path / "data")), tmp_path / "run", execution=Execution(sample_every=2))
    assert [p.name for p in (tmp_path / "run").iterdir()] == [".lock"]


def test_pictures_are_guided_where_the_model_knows_no_condition_too(tmp_path, monkeypatch):
    asked, draw = [], evaluation.draw_samples
    monkeypatch.setattr(
        evaluation, "draw_samples", lambda *args, **told: asked.append(told["guidance"]) or draw(*args, **told)
    )
    for share in (0.1, 0.0):
        config = tiny(images=4, evaluation_images=2, condition_dropout=share)
        train(config, tmp_path / str(share), execution=Execution(sample_every=1))
    assert asked == [2.0, 1.0]


def test_pictures_and_sinks_that_fail_are_said_once_and_cost_no_run(tmp_path, monkeypatch):
    plain = train(tiny(evaluation_images=4), tmp_path / "plain")

    def unreachable(*told, **settings):
        raise ConnectionError("network down")

    service = types.SimpleNamespace(log=unreachable, finish=unreachable)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: service))
    draw = evaluation.draw_samples
    monkeypatch.setattr(evaluation, "draw_samples", lambda *args, **settings: draw(*args, **settings) * math.nan)
    said = []
    execution = Execution(sample_every=4, sinks=("wandb",))
    assert result(train(tiny(evaluation_images=4), tmp_path / "run", execution=execution, say=said.append)) == result(
        plain
    )
    assert said[0] == "wandb not told (network down); training goes on"
    assert len(said) == 2 and said[1].startswith("picture not drawn (images: expected finite values")
    monkeypatch.undo()
    (tmp_path / "full/samples").mkdir(parents=True)
    (tmp_path / "full/samples/step-000000004.png").mkdir()  # no file can take its place
    monkeypatch.setattr(loop, "claim", lambda *args: None)
    assert train(tiny(evaluation_images=4), tmp_path / "full", execution=Execution(sample_every=4), say=said.append)
    assert len(said) == 3 and "picture not drawn" in said[2] and "a folder" in said[2]


class Recorder(types.ModuleType):
    """Stands for a service's package and keeps what it is told."""

    def __init__(self, name):
        super().__init__(name)
        self.started, self.rows, self.finished = None, [], False

    def init(self, **settings):
        print("hello")
        self.started = settings
        return self

    def log(self, values, step):
        self.rows.append((step, values))

    def finish(self):
        print("goodbye")
        self.finished = True

    def Image(self, path):
        return ("image", path)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_are_told_what_the_metrics_hold(tmp_path, monkeypatch, name, capsys):
    service = Recorder(name)
    monkeypatch.setitem(sys.modules, name, service)
    record = train(
        tiny(evaluation_images=4), tmp_path, execution=Execution(sinks=(name,), sample_every=6, validate_every=5)
    )
    assert record["run_id"] in (service.started.get("id"), service.started["name"])
    assert service.started["config"]["lr"] == 1e-2 and service.started["resume"] == "allow" and service.finished
    told = [(step, values["train_loss"]) for step, values in service.rows if "train_loss" in values]
    assert told == [(row["step"], row["train_loss"]) for row in metrics(tmp_path)]
    assert [step for step, values in service.rows if "loss" in values] == [5, 10]
    assert [(s, v["samples"][0]) for s, v in service.rows if "samples" in v] == [(6, "image"), (12, "image")]
    assert capsys.readouterr() == ("", "hello\ngoodbye\n"), "stdout may be a command's JSON"


def test_tensorboard_holds_what_the_metrics_hold(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    execution = Execution(sinks=("tensorboard",), sample_every=6)
    with pytest.raises(Stopped):
        train(tiny(evaluation_images=4), tmp_path, execution=execution, should_stop=stop_after(4))
    train(tiny(evaluation_images=4), tmp_path, execution=execution)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("train_loss")]
    expected = [(row["step"], row["train_loss"]) for row in metrics(tmp_path)]
    assert [step for step, _ in points] == [step for step, _ in expected]
    assert [v for _, v in points] == pytest.approx([v for _, v in expected])
    assert [event.step for event in events.Images("samples")] == [6, 12]


def test_a_sink_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="trackio to be installed"):
        train(tiny(), tmp_path / "run", execution=Execution(sinks=("trackio",)))
    assert not (tmp_path / "run").exists()
    record = train(tiny(), tmp_path / "run")
    # A run that is done needs none.
    assert train(tiny(), tmp_path / "run", execution=Execution(sinks=("trackio",))) == record


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"device": "tpu"}, "execution.device"),
        ({"parallel": "tp"}, "execution.parallel"),
        ({"recompute": "attention"}, "execution.recompute"),
        ({"compile": "yes"}, "execution.compile"),
        ({"microbatch": 0}, "execution.microbatch"),
        ({"validate_every": -1}, "execution.validate_every"),
        ({"checkpoint_seconds": -1.0}, "execution.checkpoint_seconds"),
        ({"sinks": ("mlflow",)}, "execution.sinks"),
        ({"vae": 3}, "execution.vae: expected a folder's path"),
        ({"threads": 2}, "execution.threads: no such field"),
    ],
)
def test_bad_executions_are_named(change, named):
    with pytest.raises(InputError, match=named):
        Execution.from_dict(change)


def test_new_fields_leave_run_ids_alone():
    """A run's name is a hash of what differs from the defaults: pinned, so that folders of earlier runs go on."""
    assert tiny().run_id == TrainConfig.from_dict(tiny().to_dict()).run_id
    assert tiny().run_id == tiny(precision="float32", ema_widths=[0.05, 0.1], clip=1.0).run_id
    changed = [{"clip": 2.0}, {"seed": 1}, {"ema": "power"}, {"model": tiny().model.replace(depth=2)}, {"images": 52}]
    assert len({tiny(**change).run_id for change in ({}, *changed)}) == 1 + len(changed)
    assert tiny(images=None, flops=1e8).run_id == tiny(images=None, flops=10**8).run_id


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": math.nan}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"evaluation_seed": 1.5}, "evaluation_seed"),
        ({"evaluation_images": 10**26}, "evaluation_images"),
        ({"evaluation_times": 10**26}, "evaluation_times"),
        ({"data": 3}, "data"),
        ({"data": ""}, "data"),
        ({"flip": "yes"}, "flip"),
        ({"lr": True}, "lr"),
        ({"lr": 10**400}, "lr"),
        ({"beta1": "x"}, "beta1"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": math.nan}, "weight_decay"),
        ({"decay_shape": "steep"}, "decay_shape"),
        ({"objective": "ddpm"}, "objective"),
        ({"objective": 0}, "objective"),
        ({"ema_share": "x"}, "ema_share"),
        ({"ema": "fixed", "ema_decay": [0.9]}, "ema_decay"),
        ({"ema": "power", "ema_widths": ("x",)}, "ema_widths"),
        ({"ema_widths": 0.1}, "ema_widths"),
        ({"model": 3}, "model"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_impossible_values_are_named(change, named):
    with pytest.raises(InputError, match=f"^{named}: expected"):
        TrainConfig.from_dict(tiny(images=64).to_dict() | change)


def test_a_run_that_cannot_begin_leaves_its_folder_to_the_corrected_one(tmp_path):
    config = tiny(images=64)
    for wrong in ({"data": str(tmp_path / "nowhere")}, {"flip": True}):
        with pytest.raises(InputError):
            train(TrainConfig.from_dict(config.to_dict() | wrong), tmp_path / "run")
        assert not [p.name for p in (tmp_path / "run").iterdir() if p.name != ".lock"]
    train(config, tmp_path / "run", should_stop=None)
    with pytest.raises(InputError, match="another run"):
        train(TrainConfig.from_dict(config.to_dict() | {"data": str(tmp_path / "nowhere")}), tmp_path / "run")
    assert (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("step", [0, 3])
def test_a_fault_of_any_kind_leaves_the_folder_where_no_step_was_taken(tmp_path, monkeypatch, step):
    """A sink's own folder goes with the rest."""
    feed = Feeder.__call__

    def fail(self, number):
        if number == step:
            raise RuntimeError("out of memory")
        return feed(self, number)

    def begin(dir, **settings):
        Path(dir, "wandb").mkdir()
        return types.SimpleNamespace(log=lambda *told, **at: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=begin))
    monkeypatch.setattr(Feeder, "__call__", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tiny(), tmp_path, execution=Execution(sinks=("wandb",)))
    left = sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock")
    assert left == ([] if step == 0 else ["config.json", "data.json", "metrics.jsonl", "wandb"])


def test_a_run_that_diverged_and_then_failed_leaves_the_folder_where_no_step_was_taken(tmp_path, monkeypatch):
    poisoned(monkeypatch, 0)
    monkeypatch.setattr(loop, "describe", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny(), tmp_path, say=lambda sentence: None)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_folder_of_something_else_keeps_its_files(tmp_path):
    for name in ("data.json", "metrics.jsonl"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="expected an empty folder"):
        train(tiny(), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != ".lock") == ["data.json", "metrics.jsonl"]


DIVERGES = """
images = 64
batch = 4
evaluation_images = 4
lr = 1e18
clip = 1e18
[model]
image_size = 16
latent_factor = 1
in_channels = 3
patch = 4
width = 16
depth = 1
heads = 2
condition = "none"
learn_sigma = false
"""


def test_a_run_that_diverged_says_so_when_it_is_called_again(tmp_path, run):
    (tmp_path / "config.toml").write_text(DIVERGES)
    arguments = ("train", tmp_path / "config.toml", "--out", tmp_path / "run", "--threads", 1)
    assert run(*arguments)[0] == 1
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (1, "", 1) and "diverged after" in err and "of 16 steps" in err


@pytest.mark.parametrize("table", [3, [], "x", {"sinks": 3}, {"checkpoint_seconds": True}], ids=str)
def test_an_impossible_execution_is_named(table):
    with pytest.raises(InputError, match="^execution.*: expected"):
        Execution.from_dict(table)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\xff"], ids=["empty", "cut", "deep", "no UTF-8"])
def test_a_file_that_is_no_json_is_named(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"run\.json: expected a JSON file, got"):
        read_json(tmp_path / "run.json")
    with pytest.raises(InputError, match=r"nowhere\.json: expected a JSON file, got No such file"):
        read_json(tmp_path / "nowhere.json")


@pytest.mark.parametrize("values", [3, [1], "x"])
def test_a_configuration_that_is_no_table_is_named(values):
    with pytest.raises(InputError, match="^training: expected a table"):
        TrainConfig.from_dict(values)


def test_an_impossible_number_of_threads_is_named():
    for threads in (0, 10**26):
        with pytest.raises(InputError, match="--threads: expected 1 to"):
            use_threads(threads)


def test_threads_are_the_option_s_the_environment_s_or_all_cores(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("ditscale.dit.commands._cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    use_threads(None)
    assert chosen == []  # torch has read it
    use_threads(5)
    use_threads(None, processes=2)  # under torchrun
    monkeypatch.delenv("OMP_NUM_THREADS")
    use_threads(None)
    use_threads(None, processes=20)
    assert chosen == [5, 4, 8, 1]


@pytest.mark.parametrize("place", ["", "folder", "nowhere/file", "file/below", "x" * 300])
def test_a_place_that_takes_no_file_is_named(tmp_path, monkeypatch, place):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="expected a place to write, got"):
        write_atomically(Path(place), b"new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(("loss", "shown"), [(0.5, True), (math.nan, False)])
def test_a_bar_shows_no_loss_where_there_is_none(capsys, loss, shown):
    with progress_bar("drawing", show=True) as advance:
        advance(1, 1, loss)
    told = capsys.readouterr().err
    assert "drawing" in told and ("loss" in told) == shown
