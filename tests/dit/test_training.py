"""Training: it learns, its record is true, and no interruption changes a bit of the result."""

from __future__ import annotations

import json
import math

import pytest
from training_cases import metrics, result, stop_after, tiny, weights_of

from ditscale.dit.checkpoint import newest_checkpoint, read_metrics
from ditscale.dit.diffusion import DDPM, EDM
from ditscale.dit.flops import count
from ditscale.dit.flow import RectifiedFlow
from ditscale.dit.training import Execution, Stopped, check_record, loop, train, validation_set
from ditscale.dit.training.record import objective_name
from ditscale.dit.weights import load_weights
from ditscale.errors import InputError

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_loss_falls_and_the_record_is_true(tmp_path):
    config = tiny(images=800)
    record = train(config, tmp_path / "run")
    untrained = train(tiny(images=4, lr=1e-9), tmp_path / "short")
    assert record["loss"] < 0.8 * untrained["loss"]
    assert record["steps"] == 200 and record["images"] == 800 and record["tokens"] == 800 * 16
    assert record["flops"] == 800 * count(config.model).train
    assert record["params"] == sum(
        p.numel() for p in load_weights(tmp_path / "run/weights.safetensors")[0].parameters()
    )
    assert record["loss"] == pytest.approx(sum(record["loss_by_timestep"]) / 8)
    # What is kept is what was judged: the averaged weights.
    model, flow = load_weights(tmp_path / "run/weights.safetensors")
    assert validation_set(config).loss(model, flow) == record["loss_by_timestep"]
    assert check_record(tmp_path / "run/run.json", config) == json.loads(json.dumps(record))
    rows = read_metrics(tmp_path / "run/metrics.jsonl")
    assert rows[-1]["images"] == 800 and rows[-1]["flops"] == record["flops"]
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_a_flop_budget_buys_whole_batches(tmp_path):
    per_image = count(tiny().model).train
    config = tiny(images=None, flops=11 * per_image)
    assert config.steps == 2
    with pytest.raises(InputError, match="flops: expected enough for one batch"):
        tiny(images=None, flops=3 * per_image)


def test_a_flop_budget_is_what_a_mixture_with_room_for_few_spends(tmp_path):
    """Its experts' rows are rounded up once a batch, so a batch costs less than its images one by one."""
    model = tiny().model.replace(patch=8, experts=8, experts_per_token=1, expert_capacity=0.1)
    batch = count(model, batch=4).train
    assert batch < 4 * count(model).train
    config = tiny(model=model, images=None, flops=3 * batch)
    assert train(config, tmp_path / "run")["flops"] == 3 * batch and config.steps == 3


def test_stopping_and_going_on_changes_no_bit(tmp_path):
    config = tiny()
    whole = train(config, tmp_path / "whole")
    for steps in (3, 5, 1):
        with pytest.raises(Stopped):
            train(config, tmp_path / "parts", should_stop=stop_after(steps))
    parts = train(config, tmp_path / "parts")
    assert result(parts) == result(whole)
    assert weights_of(tmp_path / "parts") == weights_of(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "header", "number", "step", "old header"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage):
    config = tiny()
    whole = train(config, tmp_path / "whole")
    for steps in (3, 4):
        with pytest.raises(Stopped):
            train(config, tmp_path / "run", should_stop=stop_after(steps))
    newest = max((tmp_path / "run").glob("checkpoint-*/*.safetensors"))
    header = newest.parent.with_suffix(".json")
    if damage == "header":
        header.write_text('{"step": 7, "sha')
    elif damage == "number":
        header.write_text(header.read_text().replace('"updates": 7', '"updates": 5'))  # one bit
    elif damage == "step":
        header.write_bytes(min((tmp_path / "run").glob("checkpoint-*.json")).read_bytes())
    elif damage == "old header":  # without a checksum of its own
        old = {name: value for name, value in json.loads(header.read_text()).items() if name != "sha256"}
        min((tmp_path / "run").glob("checkpoint-*.json")).unlink()
        header.write_text(json.dumps(old))
        assert newest_checkpoint(tmp_path / "run")[0].state == old["state"]
        del old["state"]
        header.write_text(json.dumps(old))
        assert "damaged" in newest_checkpoint(tmp_path / "run")[1][0]
        return
    else:
        data = bytearray(newest.read_bytes())
        data[len(data) // 2] ^= 1
        newest.write_bytes(data[:-10] if damage == "truncated" else data)
    checkpoint, complaints = newest_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.step == 3 and "damaged" in complaints[0]
    said = []
    assert result(train(config, tmp_path / "run", say=said.append)) == result(whole)
    assert any("falling back to the one of step 3; it is removed" in sentence for sentence in said)


def test_checkpoints_outlive_damaged_ones_of_later_steps(tmp_path):
    config, run, said = tiny(images=160), tmp_path / "run", []
    for steps in (30, 2):
        with pytest.raises(Stopped):
            train(config, run, should_stop=stop_after(steps))
    for header in run.glob("checkpoint-*.json"):
        header.write_text("{")
    with pytest.raises(Stopped):
        train(config, run, execution=Execution(checkpoint_seconds=0), should_stop=stop_after(5), say=said.append)
    assert len(said) == 2 and all("none before it is whole; it is removed" in sentence for sentence in said)
    assert sorted(p.name for p in run.glob("checkpoint-*.json")) == [f"checkpoint-00000000{s}.json" for s in (4, 5)]


def test_a_finished_run_is_not_trained_again(tmp_path):
    first = train(tiny(), tmp_path)
    assert train(tiny(), tmp_path, progress=lambda *_: pytest.fail("trained again")) == json.loads(json.dumps(first))


def test_a_corrupt_record_is_said_and_mended(tmp_path):
    first = train(tiny(), tmp_path)
    (tmp_path / "run.json").write_text("{")
    said = []
    assert result(train(tiny(), tmp_path, say=said.append)) == result(first)
    assert "run.json" in said[0]


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="thesis.tex"):
        train(tiny(), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    train(tiny(), tmp_path / "run")
    with pytest.raises(InputError, match="another run"):
        train(tiny(lr=5e-3), tmp_path / "run")


def test_a_finished_run_without_its_weights_says_so(tmp_path):
    record, weights, said = train(tiny(), tmp_path), tmp_path / "weights.safetensors", []
    train(tiny(), tmp_path, say=said.append)
    assert not said
    data = bytearray(weights.read_bytes())
    data[-9] ^= 64
    weights.write_bytes(data)
    assert train(tiny(), tmp_path, say=said.append) == record and "weights of this finished run, got others" in said[-1]
    weights.unlink()
    assert train(tiny(), tmp_path, say=said.append) == record and "weights of this finished run, got none" in said[-1]
    old = {name: value for name, value in record.items() if name != "weights_sha256"}
    (tmp_path / "run.json").write_text(json.dumps(old))
    weights.write_bytes(data)
    assert train(tiny(), tmp_path, say=said.append) == old and len(said) == 2


def test_a_validation_loss_that_is_not_finite_is_a_divergence(tmp_path, monkeypatch):
    """Also when it is called again; the metrics stay JSON, and the last step has a checkpoint to look into."""
    measured = loop.validation_losses
    monkeypatch.setattr(loop, "validation_losses", lambda *args: [math.nan, *measured(*args)[1:]])
    said = []
    record = train(tiny(), tmp_path, execution=Execution(validate_every=5), say=said.append)
    assert (record["status"], record["loss"], record["steps"]) == ("diverged", None, 12)
    assert record["reason"].startswith("validation loss nan at time 0.") and record["reason"] in said[-1]
    assert train(tiny(), tmp_path) == record and newest_checkpoint(tmp_path)[0].step == 12
    row = read_metrics(tmp_path / "metrics.jsonl")[4]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert row["loss"] is None and row["loss_by_timestep"][0] is None and row["loss_by_timestep"][1] > 0


def test_records_say_what_a_loss_was_measured_on_and_what_was_minimised(tmp_path):
    one = train(tiny(images=8), tmp_path / "one")
    assert one["objective"] == "rectified_flow_v" and one["evaluation"].startswith("8x8-")
    for place, changes, same in (
        ("seed", {"seed": 1, "lr": 1e-3, "prediction": "clean"}, True),
        ("evaluation", {"evaluation_seed": 1}, False),
        ("images", {"evaluation_images": 4}, False),
        ("times", {"evaluation_times": 4}, False),
    ):
        other = train(tiny(images=8, **changes), tmp_path / place)
        assert (other["evaluation"] == one["evaluation"]) is same and other["objective"] == one["objective"], place


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (RectifiedFlow(prediction="clean", network="flow", shift=1), "rectified_flow_v"),
        (RectifiedFlow(shift=3, times="uniform"), "rectified_flow_v(times=uniform, shift=3)"),
        (RectifiedFlow(shift=3.0, times="uniform"), "rectified_flow_v(times=uniform, shift=3)"),
        (DDPM(learn_sigma=False, timesteps=250, schedule="cosine"), "ddpm_epsilon(timesteps=250, schedule=cosine)"),
        (EDM(rho=5.0, sigma_data=0.25, log_mean=-0.4), "edm(sigma_data=0.25, log_mean=-0.4)"),
    ],
    ids=str,
)
def test_objectives_in_records_have_what_is_not_the_default(objective, name):
    assert objective_name(objective) == name


def test_a_diverged_run_is_recorded_as_such(tmp_path):
    said = []
    record = train(tiny(lr=1e18, clip=1e18), tmp_path, say=said.append)
    assert record["status"] == "diverged" and record["loss"] is None and "seed 0" in said[0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"images": None}, "images, flops"),
        ({"flops": 10**9}, "images, flops"),
        ({"batch": 0}, "batch"),
        ({"lr": -1.0}, "lr"),
        ({"ema_share": 2.0}, "ema_share"),
        ({"images": 3}, "images"),
        ({"images": 10**400}, "images: expected a number above 0"),
        ({"images": None, "flops": 10**400}, "flops: expected a number above 0"),
        ({"beta1": 1}, "beta1: expected a number from 0 to below 1"),
        ({"beta2": 1.0}, "beta2: expected a number from 0 to below 1"),
        ({"warmup_fraction": 0.6, "decay_fraction": 0.6}, "warmup_fraction, decay_fraction: expected a sum"),
    ],
)
def test_bad_settings_are_named(change, named):
    with pytest.raises(InputError, match=named):
        tiny(**change)


def test_data_that_does_not_fit_the_model_is_named(tmp_path):
    with pytest.raises(InputError, match="data: expected emoji_scenes, emoji_clips or a folder"):
        train(tiny(data=str(tmp_path / "nowhere")), tmp_path / "a")
    wrong = tiny().model.replace(vocabulary_size=12)
    with pytest.raises(InputError, match="vocabulary_size"):
        train(tiny(model=wrong), tmp_path / "b")


def test_weights_remember_what_the_network_predicts(tmp_path):
    train(tiny(prediction="clean"), tmp_path / "clean")
    train(tiny(), tmp_path / "velocity")
    flows = {name: load_weights(tmp_path / name / "weights.safetensors")[1] for name in ("clean", "velocity")}
    assert {name: flow.prediction for name, flow in flows.items()} == {"clean": "clean", "velocity": "velocity"}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, "velocity"),
        ({"prediction": "clean"}, "clean"),
        ({"objective": RectifiedFlow(prediction="clean")}, "clean"),
        ({"objective": DDPM(learn_sigma=False)}, "epsilon"),
        ({"objective": EDM()}, "clean"),
    ],
    ids=str,
)
def test_the_record_says_what_the_model_predicts(tmp_path, asked, told):
    assert train(tiny(images=8, evaluation_images=2, **asked), tmp_path)["prediction"] == told
