"""Every architecture and every objective trains on the embedded data, and its validation loss falls."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from model_variants import TINY, VARIANTS
from PIL import Image

from ditscale.dit import DDPM, EDM, DiTConfig, RectifiedFlow
from ditscale.dit.config import read_toml
from ditscale.dit.data import EmojiScenes, clip_vocabulary, emoji_vocabulary, to_float, write_latents
from ditscale.dit.sampling import draw_samples
from ditscale.dit.training import TrainConfig, train, validation_set
from ditscale.dit.weights import load_weights
from ditscale.errors import InputError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SMALL = {
    "image_size": 16, "latent_factor": 1, "in_channels": 3, "patch": 4, "width": 24, "depth": 2, "heads": 3,
    "frequency_width": 32, "learn_sigma": False, "condition": "caption", "vocabulary_size": len(emoji_vocabulary()),
    "caption_width": 8, "mup_base_width": 24,
}  # fmt: skip
# What data on disk or another encoder would be needed for is put right here; all else is as the variant says.
EMBEDDED = {
    "pooled_width": 0,
    "image_width": None,
    "in_channels": 3,
    "latent_factor": 1,
    "image_size": 16,
    "learn_sigma": False,
}
# Of data on disk, which the embedded ones are not: latents, wide pictures, and what a text encoder says.
ON_DISK = {
    "adaln-zero, latents": {"data": "latents"},
    "adaln-zero, wide image": {"data": "pictures", "in_channels": 3, "image_size": 16, "image_width": 32, "patch": 4},
    "joint": {"data": "latents", "in_channels": 4, "latent_factor": 2, "image_size": 16},
    "adaln-single, cross-attention": {"data": "latents", "in_channels": 4, "latent_factor": 2, "image_size": 16},
}
NAMES = [name for name in VARIANTS if name not in ("adaln-zero, latents", "adaln-zero, wide image")]


def config_for(name: str) -> DiTConfig:
    """The variant on embedded data: captions of words where it takes captions, the scenes' nine classes where labels."""
    fields = SMALL | VARIANTS[name] | EMBEDDED
    fields |= {"condition": VARIANTS[name].get("condition", "class"), "num_classes": 9}
    fields["vocabulary_size"] = len(clip_vocabulary() if "frames" in fields else emoji_vocabulary())
    if fields.get("context", "pooled") != "pooled":
        fields["caption_tokens"] = 10
    if "patch_frames" in fields:
        fields["patch"] = 2  # a patch of no more numbers than the width
    return DiTConfig(**fields)


def plan(model: DiTConfig, **changes) -> TrainConfig:
    settings = {"data": "emoji_clips" if model.is_video else "emoji_scenes", "batch": 8, "images": 8 * 30, "lr": 2e-2}
    settings |= {"evaluation_images": 24, "evaluation_times": 4}
    return TrainConfig(**{"model": model, **settings, **changes})


pytestmark = pytest.mark.usefixtures("one_thread")


def untrained_loss(config: TrainConfig) -> float:
    from ditscale.dit import DiT

    torch.manual_seed(0)
    by_time = validation_set(config).loss(DiT(config.model), config.flow)
    return math.fsum(by_time) / len(by_time)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_falls(tmp_path, name):
    config = plan(config_for(name))
    record = train(config, tmp_path / "run")
    assert record["status"] == "finished"
    # A model that says nothing has the loss E |eps - x_0|^2; thirty small steps already say much.
    assert record["loss"] < 0.82 * untrained_loss(config), record["loss"]
    assert config.model.experts == 0 or load_weights(tmp_path / "run/weights.safetensors")[0].balance_loss is None


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """Embedded scenes as a user's own data: wide pictures of two scenes each, in a folder for each class; and cached latents,
    means over 2 x 2 pixels, with classes and with what stands for a text encoder's features and pooled vectors."""
    folder = tmp_path_factory.mktemp("data")
    scenes = EmojiScenes("train", 16, seed=9).batch(0, 400)
    wide = np.concatenate([scenes.images[:200], scenes.images[200:]], axis=3)
    for i, (picture, label) in enumerate(zip(wide, scenes.labels, strict=False)):
        (folder / f"pictures/class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.transpose(1, 2, 0)).save(folder / f"pictures/class {label}/{i}.png")
    means = to_float(scenes.images).reshape(400, 3, 8, 2, 8, 2).mean((3, 5))
    draw = np.random.default_rng(0)
    words = (scenes.tokens[:, :4] / 1000).astype(np.float32)
    tensors = {
        "latents": np.concatenate([means, means.mean(1, keepdims=True)], axis=1).astype(np.float32),
        "labels": scenes.labels.astype(np.int64),
        "features": words[:, :, None] * draw.normal(size=6).astype(np.float32),
        "pooled": words @ draw.normal(size=(4, 7)).astype(np.float32),
    }
    write_latents(folder / "latents", [tensors], latent_factor=2, mean=[0.0] * 4, std=[0.5] * 4)
    return folder


@pytest.mark.parametrize("name", ON_DISK)
def test_the_loss_falls_on_data_on_disk(tmp_path, own_data, name):
    changes = dict(ON_DISK[name])
    data = own_data / changes.pop("data")
    fields = TINY | VARIANTS[name] | changes
    classes = len(list(data.iterdir())) if data.name == "pictures" else 9
    fields |= {"num_classes": classes, "mup_base_width": 24}
    config = plan(DiTConfig(**fields), data=str(data), images=8 * 51)
    record = train(config, tmp_path / "run")
    assert record["loss"] < 0.75 * untrained_loss(config), record["loss"]
    assert record["data"].endswith(f"{data.name}/train") and record["epochs"] > 1


OBJECTIVES = {
    "ddpm": (DDPM(), {"learn_sigma": True}, 0.8),
    "ddpm, fixed variance, cosine": (DDPM(schedule="cosine", learn_sigma=False), {}, 0.9),
    "edm": (EDM(sigma_data=0.6), {}, 0.8),
    "flow, uniform and shifted times": (RectifiedFlow(times="uniform", shift=2.0), {}, 0.75),
    "flow, clean": (RectifiedFlow(prediction="clean"), {}, 0.75),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_every_objective_falls_and_its_model_draws(tmp_path, name):
    objective, changes, share = OBJECTIVES[name]
    config = plan(config_for("adaln-zero").replace(**changes), objective=objective, images=8 * 50, lr=1e-2)
    record = train(config, tmp_path / "run")
    assert record["loss"] < share * untrained_loss(config), record["loss"]
    assert (record["objective"].split("(")[0], record["loss_kind"]) == (objective.record_name, objective.loss_kind)
    model, loaded = load_weights(tmp_path / "run/weights.safetensors")
    assert loaded == objective
    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for sampler in ("heun", "ddpm"):
        settings = {"objective": loaded, "steps": 8, "sampler": sampler, "guidance": 1.5, "clip": 1.0}
        images = draw_samples(model, noise, torch.tensor([0, 3, 5, 8]), **settings)
        assert bool(images.isfinite().all()) and 0.05 < float(images.std()) < 2


def test_data_that_a_video_model_does_not_fit_is_named(tmp_path):
    video = config_for("video")
    with pytest.raises(InputError, match="data: expected emoji_clips for videos"):
        train(plan(video, data="emoji_scenes"), tmp_path / "a")
    with pytest.raises(InputError, match="data: expected emoji_clips for videos"):
        train(plan(config_for("adaln-zero"), data="emoji_clips"), tmp_path / "b")


@pytest.mark.parametrize("path", sorted(p.name for p in EXAMPLES.glob("*.toml") if "[training]" not in p.read_text()))
def test_example_configurations_train(tmp_path, path):
    values = read_toml(EXAMPLES / path)
    values.pop("flops", None)
    config = TrainConfig.from_dict(
        {**values, "images": 2 * values["batch"], "evaluation_images": 4, "evaluation_times": 2}
    )
    record = train(config, tmp_path / "run")
    assert record["steps"] == 2 and record["status"] == "finished"
