"""What a run knows of its data: faults are said before training, and words, classes and scale stay those of the training."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch
from PIL import Image
from training_cases import result, stop_after, tiny, weights_of

from ditscale.dit.checkpoint import newest_checkpoint
from ditscale.dit.data import ImageFolder, write_latents
from ditscale.dit.files import read_json
from ditscale.dit.image_commands import condition_tensor, evaluate, export, sample
from ditscale.dit.rundata import RunData
from ditscale.dit.training import Stopped, replay_step, train
from ditscale.dit.weights import load_weights, save_weights
from ditscale.errors import InputError

COLOURS = ("red", "green", "blue", "grey", "pink", "teal")

pytestmark = pytest.mark.usefixtures("one_thread")


def add(folder, numbers, caption=None):
    """Pictures of two classes by their numbers, each with a caption."""
    for i in numbers:
        place = folder / ("even", "odd")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(caption or f"{COLOURS[i % 6]} {COLOURS[i % 5]}")


def held_out(folder):
    """Paths of the pictures of the validation split."""
    return [folder / name for name in ImageFolder(folder, 16, split="validation").names]


@pytest.fixture
def pictures(tmp_path):
    add(tmp_path / "pictures", range(60))
    assert 1 < len(held_out(tmp_path / "pictures")) < 8
    return tmp_path / "pictures"


def by_caption(folder):
    return tiny(data=str(folder), model=tiny().model.replace(vocabulary_size=8))


def by_class(folder):
    model = tiny().model.replace(condition="class", num_classes=2, vocabulary_size=0)
    return tiny(data=str(folder), model=model)


def remove(folder):
    for path in held_out(folder):
        path.unlink()


def cut_short(folder):
    path = held_out(folder)[0]
    path.write_bytes(path.read_bytes()[:150])


def take_out_of_its_class(folder):
    names = iter(f"{i}.png" for i in range(1000))
    Image.new("RGB", (16, 16)).save(folder / "x.png")
    while not any(path.parent == folder for path in held_out(folder)):
        next(folder.glob("*.png")).rename(folder / next(names))


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (remove, "expected images for 'validation', got none"),
        (cut_short, "expected an image"),
        (take_out_of_its_class, "an image without one"),
    ],
)
def test_a_fault_of_the_validation_data_is_said_before_the_first_step(pictures, tmp_path, fault, named):
    fault(pictures)
    steps = []
    with pytest.raises(InputError, match=named):
        train(by_class(pictures), tmp_path / "run", progress=lambda *told: steps.append(told))
    assert not steps and not [p.name for p in (tmp_path / "run").iterdir() if p.name != ".lock"]


def test_a_run_goes_on_with_the_words_that_it_began_with_or_not_at_all(pictures, tmp_path):
    config, run = by_caption(pictures), tmp_path / "run"
    whole = train(config, tmp_path / "whole")
    with pytest.raises(Stopped):
        train(config, run, should_stop=stop_after(4))
    before = RunData.read(run)
    captions = {path: path.read_text() for path in (pictures / "odd").glob("*.txt")}
    for path in captions:
        path.write_text("aardvark")
    for go_on in (lambda: train(config, run), lambda: replay_step(run)):
        with pytest.raises(InputError, match=r"run/data\.json: expected the words of the data .* bring the data back"):
            go_on()
    assert RunData.read(run) == before
    for path, caption in captions.items():
        path.write_text(caption)
    assert result(train(config, run)) == result(whole) and weights_of(run) == weights_of(tmp_path / "whole")


def test_a_picture_that_goes_while_training_costs_no_step(pictures, tmp_path):
    """The data are named by their content at the end; a run goes on with as many pictures as it began with."""
    config, run = by_class(pictures), tmp_path / "run"
    whole = train(config, tmp_path / "whole")
    lost = pictures / ImageFolder(pictures, 16, split="train").names[0]
    content = lost.read_bytes()

    def remove(step, steps, loss):
        lost.unlink(missing_ok=True)

    with pytest.raises(
        InputError, match=r"data: expected folder:pictures/train as it was trained on, got .*No such file"
    ):
        train(config, run, progress=remove)
    assert newest_checkpoint(run)[0].step == config.steps
    with pytest.raises(InputError, match="expected the samples of the data .* got 57 instead of 58 from"):
        train(config, run)
    told = read_json(run / "data.json")
    del told["samples"]  # as an earlier version wrote it
    (run / "data.json").write_text(json.dumps(told))
    lost.write_bytes(content)
    steps = []
    assert result(train(config, run, progress=lambda *told: steps.append(told))) == result(whole) and not steps


def test_evaluation_numbers_words_as_training_did(pictures, tmp_path, capsys):
    run = tmp_path / "run"
    record = train(by_caption(pictures), run)

    def loss():
        evaluate(runs=[run], as_json=True, threads=1, device="cpu")
        return json.loads(capsys.readouterr().out)["loss_by_timestep"]

    assert loss() == record["loss_by_timestep"]
    kept = held_out(pictures)
    added = [i for i in range(60, 90) if i % 2]
    add(pictures, added, "aardvark apple")
    for path in set(held_out(pictures)) - set(kept):
        path.unlink()
    words = ImageFolder(pictures, 16, words=8).vocabulary.words
    assert "aardvark" in words and words != RunData.read(run).vocabulary.words
    assert loss() == record["loss_by_timestep"]


def test_evaluation_refuses_classes_of_another_order(pictures, tmp_path):
    train(by_class(pictures), tmp_path / "run")
    (pictures / "even").rename(pictures / "zero")
    with pytest.raises(InputError, match="data: expected the classes of the data that the run was trained on"):
        evaluate(runs=[tmp_path / "run"], threads=1, device="cpu")


def test_exported_weights_know_the_words_wherever_they_lie(pictures, tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    train(by_caption(pictures), run)
    train(by_class(pictures), other)
    data = RunData.read(run)
    for out in (tmp_path / "alone.safetensors", other / "weights-of-run.safetensors"):
        export(run=run, out=out)
        assert RunData.read(out) == data
        export(run=out, out=tmp_path / "again.safetensors")
        assert RunData.read(tmp_path / "again.safetensors") == data
        config = load_weights(out)[0].config
        tokens = condition_tensor(config, ["teal red"], None, RunData.read(out))
        assert torch.equal(tokens, condition_tensor(config, ["teal red"], None, data)) and tokens[0, 0] > 1
        sample(run=out, out=tmp_path / "x.png", caption=["teal red"], steps=1, device="cpu")
    # A run's own weights have none in their header: they lie beside data.json.
    assert RunData.read(run / "weights.safetensors") == data


def test_exported_weights_know_the_scale_of_latents(tmp_path):
    latents = np.random.default_rng(0).normal(3, 5, (80, 4, 4, 4)).astype(np.float32)
    write_latents(tmp_path / "data", [{"latents": latents}], latent_factor=8, mean=[3.0] * 4, std=[5.0] * 4)
    model = tiny().model.replace(
        latent_factor=8, image_size=32, in_channels=4, patch=2, condition="none", vocabulary_size=0
    )
    train(tiny(data=str(tmp_path / "data"), model=model, evaluation_images=2), tmp_path / "run")
    export(run=tmp_path / "run", out=tmp_path / "alone.safetensors")
    data = RunData.read(tmp_path / "alone.safetensors")
    assert data == RunData.read(tmp_path / "run") and data.mean == (3.0,) * 4 and data.std == (5.0,) * 4
    assert torch.equal(data.unscaled(torch.ones(1, 4, 2, 2)), torch.full((1, 4, 2, 2), 8.0))


def test_a_header_that_tells_no_data_of_ours_is_named(tmp_path):
    config, damaged = tiny(), types.SimpleNamespace(to_dict=lambda: {"name": "x"})
    save_weights(tmp_path / "x.safetensors", {}, config.model, config.flow, damaged)
    with pytest.raises(InputError, match=r"x\.safetensors: expected what a run knows of its data"):
        RunData.read(tmp_path / "x.safetensors")
