"""Quality of samples: a perfect model scores as real images do, records name everything, features come from where they say."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditscale.dit import DDPM, DiT, DiTConfig, sampling
from ditscale.dit.data import EmojiScenes, ImageBatch, ImageShards, emoji_vocabulary, to_float, write_latents
from ditscale.dit.encoding import Autoencoder
from ditscale.dit.evaluation import quality
from ditscale.dit.evaluation.captions import caption_match, matched
from ditscale.dit.evaluation.networks import FeatureNetwork, open_network
from ditscale.dit.evaluation.quality import (
    FIELDS,
    QualitySettings,
    measure_quality,
    reference_features,
)
from ditscale.dit.evaluation.scene_network import scene_network, scene_network_card, scene_network_sha256, word_targets
from ditscale.dit.flops import count
from ditscale.dit.image_commands import evaluate, sample
from ditscale.dit.pictures import to_bytes
from ditscale.dit.rundata import RunData
from ditscale.dit.training import TrainConfig, train
from ditscale.dit.weights import save_weights
from ditscale.errors import InputError
from ditscale.scaling import RunTable
from ditscale.scaling.quality import FEATURE_METRICS, SETTINGS

MODEL = DiTConfig(
    image_size=16, latent_factor=1, in_channels=3, patch=4, width=16, depth=1, heads=2, frequency_width=16,
    condition="caption", vocabulary_size=len(emoji_vocabulary()), caption_width=8, learn_sigma=False, mup_base_width=16,
)  # fmt: skip
PLAN = TrainConfig(model=MODEL, batch=8, images=8 * 40, lr=1e-2, evaluation_images=8)
FEW = QualitySettings(samples=96, reference=300, steps=3, sampler="euler", batch=40)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DITSCALE_CACHE", str(tmp_path / "cache"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_shipped_network_is_small_named_and_knows_its_words():
    card, network = scene_network_card(), scene_network()
    assert card["name"] == "ditscale-scenes-v1" and card["command"] == "python tools/train_scene_network.py"
    assert card["words"] == len(network.words) and len(scene_network_sha256()) == 64
    assert sum(p.numel() for p in network.parameters()) < 300_000
    scenes = EmojiScenes("train", 32, seed=77).batch(0, 600)
    with torch.no_grad():
        odds = network.log_odds(network(torch.from_numpy(to_float(scenes.images))))
    said = word_targets(torch.from_numpy(scenes.tokens), network.words).float()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, said, reduction="none").sum(1).mean()
    blind = (
        torch.nn.functional.binary_cross_entropy(network.base_rates.expand_as(said), said, reduction="none")
        .sum(1)
        .mean()
    )
    # On scenes that it was not trained on it is as good as its card says, and far better than the words' frequencies.
    assert float(loss) == pytest.approx(card["nats_a_caption"], rel=0.05) and float(loss) < 0.8 * float(blind)


def test_captions_are_found_on_real_scenes_and_by_chance_on_noise():
    stream = EmojiScenes("train", 32, seed=78)
    scenes = stream.batch(0, 300)
    real = torch.from_numpy(scenes.images)
    found = caption_match(real, stream)
    assert found["caption_match"] == found["caption_match_real"] > 0.6 and found["caption_candidates"] == 32
    shuffled = caption_match(real.roll(1, 0), stream)
    assert shuffled["caption_match"] < 0.12 and shuffled["caption_match_real"] == found["caption_match_real"]
    noise = torch.randint(256, real.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert caption_match(noise, stream)["caption_match"] < 0.12
    tokens = torch.from_numpy(scenes.tokens)
    assert matched(real, tokens, 2, 0) > found["caption_match"], "fewer to choose among is easier"
    with pytest.raises(InputError, match="samples"):
        caption_match(real[:20], stream)


def test_a_perfect_model_scores_what_real_images_do(monkeypatch):
    """Where the samples are the very scenes that were asked for, every measure is that of real images."""
    given = []

    def perfect(model, noise, y, **settings):
        given.append((noise, y, settings))
        start = sum(len(noise) for noise, *_ in given[:-1])
        stream = quality._fresh(PLAN, quality.seed_for(FEW.seed, "prompts"))
        batch = stream.batch(start, len(noise))
        assert torch.equal(y, torch.from_numpy(batch.tokens))
        return torch.from_numpy(to_float(batch.images))

    monkeypatch.setattr(quality, "draw_samples", perfect)
    record = measure_quality(DiT(MODEL), PLAN.flow, PLAN, dataclasses.replace(FEW, guidance=1.5))
    assert [len(noise) for noise, *_ in given] == [40, 40, 16]
    assert given[0][2]["guidance"] == 1.5 and given[0][2]["sampler"] == "euler" and given[0][2]["steps"] == 3
    assert record["frechet_distance"] == pytest.approx(record["frechet_distance_real"], rel=0.2)
    assert record["precision"] > 0.5 and record["recall"] > 0.5
    assert record["caption_match"] == record["caption_match_real"] > 0.3
    named = (
        "feature_network",
        "quality_samples",
        "reference_images",
        "real_images",
        "real_reference_images",
        "guidance",
        "sampler",
        "sampler_steps",
        "neighbours",
    )
    assert [record[name] for name in named] == ["ditscale-scenes-v1", 96, 300, 96, 300, 1.5, "euler", 3, 3]
    assert (
        record["feature_network_sha256"] == scene_network_sha256() and record["reference_data"] == "emoji-scenes/train"
    )
    assert set(FIELDS) - set(record) == {"fid"}, "that name is for Inception's features"
    assert set(record) < set(FIELDS), "what the next measurement takes out"
    json.dumps(record)


@pytest.mark.parametrize(
    ("there", "reference", "real"), [(None, 30, (12, 30)), (60, 30, (12, 30)), (40, 30, (12, 28)), (20, 20, (10, 10))]
)
def test_real_images_are_compared_with_others(monkeypatch, there, reference, real):
    """As many as there are samples against the reference where the data suffice; never an image with itself."""

    class Numbered:
        """Every image is its number."""

        unique_images, sha256, name = there, f"numbered {there}", "numbered"

        def batch(self, start, count):
            number = np.arange(start, start + count) % (there or 10**6)
            return ImageBatch(np.repeat(number.astype(np.uint8), 12).reshape(count, 3, 2, 2), (), None, None)

    network = FeatureNetwork("itself", "0" * 64, lambda images: images.flatten(1))
    settings = QualitySettings(samples=12, reference=30)
    whole, ours, theirs = quality._real_features(network, Numbered(), settings, None)
    assert len(whole) == reference and (len(ours), len(theirs)) == real
    assert not set(ours[:, 0, 0]) & set(theirs[:, 0, 0]) and set(theirs[:, 0, 0]) <= set(range(there or 42))
    assert set(whole[:, 0, 0]) == set(range(reference))


@pytest.mark.parametrize(
    ("sampler", "interval", "guided"), [("euler", (0.0, 1.0), 4), ("euler", (0.3, 0.8), 2), ("heun", (0.3, 0.8), 4)]
)
def test_sampling_flops_are_those_of_the_evaluations_that_were_made(sampler, interval, guided):
    """Euler asks at shares of noise 1, 3/4, 1/2, 1/4; Heun also at the ends of all steps but the last."""
    asked = []

    class Watched(DiT):
        def forward(self, x, t, y=None, **more):
            asked.append(len(x))
            return super().forward(x, t, y, **more)

    settings = dataclasses.replace(
        FEW, samples=32, batch=32, steps=4, guidance=2.0, sampler=sampler, guidance_interval=interval
    )
    record = measure_quality(Watched(MODEL), PLAN.flow, PLAN, settings)
    evaluations = 4 if sampler == "euler" else 7
    assert sum(asked) == 32 * (evaluations + guided)
    assert record["sampling_flops_per_image"] == (evaluations + guided) * count(MODEL).forward


@pytest.mark.parametrize("sampler", ["euler", "ddpm"])
def test_noise_is_each_sample_s_own_and_results_repeat(sampler):
    torch.manual_seed(0)
    model, few = DiT(MODEL), dataclasses.replace(FEW, sampler=sampler)
    record = measure_quality(model, PLAN.flow, PLAN, few)
    assert measure_quality(model, PLAN.flow, PLAN, few) == record
    other = measure_quality(model, PLAN.flow, PLAN, dataclasses.replace(few, batch=17))
    assert other["frechet_distance"] == pytest.approx(record["frechet_distance"], rel=1e-3)
    assert measure_quality(model, PLAN.flow, PLAN, dataclasses.replace(few, seed=1)) != record
    # A new model predicts zero everywhere, so its samples are pure noise: far from any scene.
    assert record["frechet_distance"] > 5 * record["frechet_distance_real"] and record["recall"] < 0.1


def test_prompts_are_numbered_by_the_words_of_the_training(tmp_path, monkeypatch):
    """Captions that came later number the folder's words anew."""
    for i in range(60):
        picture = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(("red", "blue", "aardvark")[i % 3])
    told = []

    def draw(model, noise, y, **settings):
        told.append(y[:, 0])
        return noise

    monkeypatch.setattr(quality, "draw_samples", draw)
    plan = dataclasses.replace(PLAN, model=MODEL.replace(vocabulary_size=4), data=str(tmp_path))
    settings = QualitySettings(samples=30, reference=20, steps=1)
    measure_quality(DiT(plan.model), PLAN.flow, plan, settings, trained=RunData("folder", ("blue", "red")))
    captions = quality._fresh(plan, quality.seed_for(0, "prompts")).batch(0, 30).captions
    assert told[0].tolist() == [{"blue": 2, "red": 3, "aardvark": 1}[caption] for caption in captions]


def test_the_reference_shows_the_data_as_they_are_where_training_mirrors_them(tmp_path):
    for i in range(40):
        picture = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    plan = dataclasses.replace(PLAN, model=MODEL.replace(vocabulary_size=2), data=str(tmp_path), images=8)
    reference, mirrored = (quality._fresh(dataclasses.replace(plan, flip=flip), 1) for flip in (False, True))
    assert np.array_equal(mirrored.batch(0, 30).images, reference.batch(0, 30).images)
    assert mirrored.sha256 == reference.sha256, "one entry in the cache"


def test_references_are_kept_and_made_again_where_they_are_damaged(tmp_path):
    calls = []

    def features(images):
        calls.append(len(images))
        return images.float().mean((2, 3))

    network, stream = FeatureNetwork("mean", "0" * 64, features), EmojiScenes("train", 16, seed=5)
    first = reference_features(network, stream, 300)
    assert calls == [256, 44] and first.shape == (300, 1, 3) and first.dtype == np.float64
    assert np.array_equal(reference_features(network, stream, 300), first) and len(calls) == 2
    for changed in (dataclasses.replace(network, sha256="1" * 64), dataclasses.replace(network, name="other")):
        reference_features(changed, stream, 300)
    assert len(calls) == 6
    for path in (tmp_path / "cache/features").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:50])
    assert np.array_equal(reference_features(network, stream, 300), first) and len(calls) == 8
    reference_features(dataclasses.replace(network, preparation="brought to another mean"), stream, 300)
    assert len(calls) == 10


def test_the_reference_of_a_shard_is_made_again_where_other_pictures_lie_in_it(tmp_path):
    """Bitmaps of one shape are as long as each other, so the shard's list of names and sizes stays as it was."""
    network = FeatureNetwork("mean", "0" * 64, lambda images: images.float().mean((2, 3)))

    def features(level):
        picture = io.BytesIO()
        Image.new("RGB", (16, 16), (level, level, level)).save(picture, "BMP")
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name in ("one.bmp", "two.bmp"):
                member = tarfile.TarInfo(name)
                member.size = len(picture.getvalue())
                tar.addfile(member, io.BytesIO(picture.getvalue()))
        return reference_features(network, ImageShards(tmp_path, 16), 2).mean()

    assert [features(level) for level in (10, 200, 10)] == [10, 200, 10]
    assert len(list((tmp_path / "cache/features").iterdir())) == 2, "the first is found again"


def test_bytes_are_rounded_and_clipped():
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 5.0])
    assert to_bytes(values).tolist() == [0, 0, 64, 128, 255, 255]


def test_evaluating_a_run_enters_its_record_and_the_run_table(tmp_path, capsys):
    for name, changes in (("a", {}), ("b", {"seed": 1})):
        train(dataclasses.replace(PLAN, **changes), tmp_path / "runs" / name)
    folders = [tmp_path / "runs" / name for name in "ab"]
    # Of an earlier measurement on other features, which a new one replaces.
    earlier = json.loads((folders[0] / "run.json").read_text()) | {"fid": 12.3, "recall": 2.0, "decoder": "vae"}
    (folders[0] / "run.json").write_text(json.dumps(earlier))
    settings = {"samples": 64, "reference": 200, "steps": 4, "guidance": 2.0, "threads": 1}
    evaluate(runs=folders, **settings, as_json=True)
    results = json.loads(capsys.readouterr().out)["runs"]
    for folder, result in zip(folders, results, strict=True):
        record = json.loads((folder / "run.json").read_text())
        assert result["loss"] == record["loss"] and result["frechet_distance"] == record["frechet_distance"]
        assert (record["quality_samples"], record["guidance"], record["sampler_steps"]) == (64, 2.0, 4)
        assert "fid" not in record and record["decoder"] is None
    evaluate(runs=folders[:1], **settings)
    assert "ditscale-scenes-v1 features" in capsys.readouterr().out
    (tmp_path / "runs.jsonl").write_text(
        "".join(json.dumps(json.loads((f / "run.json").read_text())) + "\n" for f in folders)
    )
    table = RunTable.read(str(tmp_path / "runs.jsonl"))
    assert {"frechet_distance", "precision", "recall", "caption_match", "feature_network"} <= set(table.columns)
    # A quality law asks for all of these by name.
    assert set(SETTINGS) <= set(table.columns) and "frechet_distance" in FEATURE_METRICS
    evaluate(runs=folders[:1], as_json=True, threads=1)
    assert "frechet_distance" not in json.loads(capsys.readouterr().out)


def tiny(tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    if kind == "clip":
        config = transformers.CLIPVisionConfig(**sizes, intermediate_size=16, projection_dim=6)
        model = transformers.CLIPVisionModelWithProjection(config)
    else:
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
    model.save_pretrained(tmp_path / kind)
    return model.eval()


@pytest.mark.parametrize(("kind", "width"), [("clip", 6), ("dinov2", 8)])
def test_transformers_networks_give_their_own_features(tmp_path, kind, width):
    model = tiny(tmp_path, kind)
    network = open_network(f"{kind}:{tmp_path / kind}")
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    mean, std = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    if kind == "dinov2":
        mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = (images / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        out = model(pixel_values=x)
        found = network.features(images)
    exact = out.image_embeds if kind == "clip" else out.last_hidden_state[:, 0]
    assert network.name == f"{kind}:{kind}" and found.shape == (5, width)
    assert torch.allclose(found, exact, atol=1e-4)
    # Other sizes are resampled to the network's.
    assert network.features(torch.zeros(2, 3, 40, 40, dtype=torch.uint8)).shape == (2, width)
    (tmp_path / kind / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.0] * 3, "image_std": [1.0] * 3})
    )
    with torch.no_grad():
        raw = model(pixel_values=images / 255)
    exact = raw.image_embeds if kind == "clip" else raw.last_hidden_state[:, 0]
    again = open_network(f"{kind}:{tmp_path / kind}")
    assert torch.allclose(again.features(images), exact, atol=1e-4) and again.preparation != network.preparation


def test_dinov2_takes_pictures_at_its_processor_s_side(tmp_path):
    """The whole picture at the size of the crop; the name says so, as these are other features."""
    model = tiny(tmp_path, "dinov2")
    path = tmp_path / "dinov2/preprocessor_config.json"
    path.write_text(json.dumps({"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}))
    network = open_network(f"dinov2:{tmp_path / 'dinov2'}")
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        exact = model(pixel_values=(images / 255 - mean) / std).pooler_output
        assert network.name == "dinov2:dinov2@32" and torch.allclose(network.features(images), exact, atol=1e-4)
    path.write_text("[]")
    with pytest.raises(InputError, match="preprocessor_config.json"):
        open_network(f"dinov2:{tmp_path / 'dinov2'}")


def test_clip_without_its_projection_is_refused(tmp_path):
    """Its features would be random, and others at every load."""
    tiny(tmp_path, "clip").vision_model.save_pretrained(tmp_path / "bare")
    config = json.loads((tmp_path / "clip/config.json").read_text())
    (tmp_path / "bare/config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"got no visual_projection\.weight"):
        open_network(f"clip:{tmp_path / 'bare'}")


def test_inception_by_torch_fidelity(tmp_path, monkeypatch):
    path = tmp_path / "inception.pth"
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as fidelity
    except Exception as error:  # torchvision of another torch fails in its own way
        path.write_bytes(b"weights")
        with pytest.raises(InputError, match="pip install torch-fidelity"):
            open_network(f"inception:{path}")
        pytest.skip(f"torch-fidelity does not import: {str(error).splitlines()[0]}")
    with monkeypatch.context() as patch:  # random weights instead of a download
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        random = fidelity.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(random.state_dict(), path)
    network = open_network(f"inception:{path}")
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert network.name == "inception-v3-fid" and network.features(images).shape == (2, 2048)
    assert torch.equal(network.features(images), random(images)[0])


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory):
    """A tiny autoencoder, latents of scenes by it, and a run on them."""
    diffusers = pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, scaling_factor=0.5,
    ).save_pretrained(folder / "vae")  # fmt: skip
    scenes = EmojiScenes("train", 16, seed=3).batch(0, 120)
    latents = Autoencoder.load(folder / "vae").encode(torch.from_numpy(to_float(scenes.images)))
    mean, std = (part.tolist() for part in (latents.mean((0, 2, 3)), latents.std((0, 2, 3))))
    described = {"captions": [scenes.captions], "latent_factor": 2, "mean": mean, "std": std}
    write_latents(folder / "data", [{"latents": latents.numpy()}], **described)
    model = MODEL.replace(latent_factor=2, in_channels=4, patch=2, vocabulary_size=40)
    plan = dataclasses.replace(PLAN, model=model, data=str(folder / "data"), images=8 * 4)
    train(plan, folder / "run")
    return folder, plan, latents, described


def test_latents_are_decoded_on_both_sides(latent_run, monkeypatch, capsys):
    """Samples that are the data's own latents are the reference itself, once the same autoencoder decodes both."""
    folder, plan, latents, described = latent_run

    def perfect(model, noise, y, **settings):
        stream = quality._fresh(plan, quality.seed_for(0, "reference"))
        return torch.from_numpy(stream.batch(0, len(noise)).images)

    monkeypatch.setattr(quality, "draw_samples", perfect)
    settings = {"samples": 60, "reference": 60, "steps": 1, "threads": 1, "device": "cpu", "as_json": True}
    evaluate(runs=[folder / "run"], vae=folder / "vae", **settings)
    found = json.loads(capsys.readouterr().out)
    vae = Autoencoder.load(folder / "vae")
    assert found["decoder"] == "vae" and found["decoder_sha256"] == vae.sha256
    stored = (folder / "vae/diffusion_pytorch_model.safetensors").read_bytes()
    assert vae.sha256 == hashlib.sha256(stored).hexdigest()
    # The training split of 120 latents is too small for 60 and 60 others.
    there = found["reference_images"], found["real_images"] + found["real_reference_images"]
    assert there[0] == 60 and 60 < there[1] == quality._fresh(plan, 0).unique_images < 120
    # The batches are of 64, so all 60 samples are the first 60 of the reference: the two sets are one.
    assert found["frechet_distance"] < 1e-6 < found["frechet_distance_real"]


def test_the_reference_is_kept_under_the_autoencoder_and_the_latents(latent_run, tmp_path):
    folder, plan, latents, described = latent_run
    calls = []

    def decode(batch):
        calls.append(len(batch))
        return batch[:, :3]

    network = FeatureNetwork("mean", "0" * 64, lambda images: images.float().mean((2, 3)))
    decoder = quality.Decoder("vae", "1" * 64, decode)

    def features(decoder, plan=plan):
        return reference_features(network, quality._fresh(plan, 1), 50, decoder=decoder)

    first = features(decoder)
    assert np.array_equal(features(decoder), first) and calls == [50], "decoded once"
    features(dataclasses.replace(decoder, sha256="2" * 64))
    assert calls == [50, 50], "another autoencoder's pictures are others"
    # Latents of the same layout with other numbers are other data, though the stream's identity does not say so.
    other = tmp_path / "elsewhere" / "data"
    write_latents(other, [{"latents": -latents.numpy()}], **described)
    assert quality._fresh(plan, 1).sha256 == quality._fresh(dataclasses.replace(plan, data=str(other)), 1).sha256
    assert not np.array_equal(features(decoder, dataclasses.replace(plan, data=str(other))), first)


def test_the_reference_is_decoded_again_by_an_autoencoder_whose_scale_was_put_right(latent_run, tmp_path):
    """It is in the configuration, and the weights stay as they are."""
    folder, *_ = latent_run
    for part in ("vae", "run"):
        shutil.copytree(folder / part, tmp_path / part)
    config = tmp_path / "vae/config.json"

    def judged(scale):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"scaling_factor": scale}))
        evaluate(
            runs=[tmp_path / "run"], vae=tmp_path / "vae", samples=20, reference=30, steps=1, threads=1, device="cpu"
        )
        return json.loads((tmp_path / "run/run.json").read_text())["frechet_distance_real"]

    first, second = judged(5.0), judged(0.5)
    shutil.rmtree(tmp_path / "cache")
    assert judged(0.5) == second != first


def test_latents_need_an_autoencoder_and_pixels_none(latent_run):
    _, plan, *_ = latent_run
    decoder = quality.Decoder("vae", "0" * 64, lambda latents: latents)
    with pytest.raises(InputError, match="vae: expected an autoencoder for a model of latents, got none"):
        measure_quality(DiT(plan.model), PLAN.flow, plan, FEW)
    with pytest.raises(InputError, match="vae: expected no autoencoder for a model of pixels, got vae"):
        measure_quality(DiT(MODEL), PLAN.flow, PLAN, FEW, decoder=decoder)


def test_an_autoencoder_of_other_latents_is_refused_at_once(latent_run, tmp_path):
    folder, plan, *_ = latent_run
    sixteen = plan.model.replace(in_channels=16, condition="none", vocabulary_size=0)
    for name, model in (("deep", sixteen), ("coarse", plan.model.replace(latent_factor=4, image_size=32))):
        save_weights(tmp_path / f"{name}.safetensors", dict(DiT(model).named_parameters()), model, plan.flow)
    given = {"out": tmp_path / "x.png", "vae": folder / "vae", "device": "cpu"}
    with pytest.raises(InputError, match="vae: expected latents of 16 channels, 2 pixels a side"):
        sample(run=tmp_path / "deep.safetensors", **given)
    with pytest.raises(InputError, match="vae: expected latents of 4 channels, 4 pixels a side"):
        sample(run=tmp_path / "coarse.safetensors", caption=["a"], **given)
    pixels = tmp_path / "pixels"
    shutil.copytree(folder / "run", pixels)
    model = plan.model.replace(in_channels=3, latent_factor=1)
    save_weights(pixels / "weights.safetensors", dict(DiT(model).named_parameters()), model, plan.flow)
    with pytest.raises(InputError, match="vae: expected no autoencoder for a model of pixels"):
        evaluate(runs=[pixels], vae=folder / "vae", samples=40, threads=1, device="cpu")


@pytest.fixture
def pixel_shards(tmp_path):
    """Scenes as pixels in shards, scaled by mean and std, and a plan of a model of them."""
    scenes = EmojiScenes("train", 16, seed=3).batch(0, 150)
    scale = {"mean": [0.5, 0.25, 0.0], "std": [0.25, 0.5, 2.0]}
    write_latents(tmp_path / "data", [{"latents": to_float(scenes.images)}], latent_factor=1, **scale)
    model = MODEL.replace(condition="none", vocabulary_size=0)
    return scenes.images, dataclasses.replace(PLAN, model=model, data=str(tmp_path / "data"), images=16)


def test_pixels_in_shards_are_compared_as_pictures(pixel_shards, monkeypatch):
    pictures, plan = pixel_shards

    def perfect(model, noise, y, **settings):
        assert settings["clip"] is None, "scaled pixels reach beyond 1"
        return torch.from_numpy(quality._fresh(plan, quality.seed_for(0, "reference")).batch(0, len(noise)).images)

    monkeypatch.setattr(quality, "draw_samples", perfect)
    settings = QualitySettings(samples=60, reference=60, steps=1)
    record = measure_quality(DiT(plan.model), DDPM(learn_sigma=False), plan, settings)
    assert record["frechet_distance"] < 1e-6 and record["frechet_distance_real"] > 1 and record["precision"] == 1
    network = FeatureNetwork("sums", "0" * 64, lambda images: images.sum((2, 3)))
    sums = reference_features(network, quality._fresh(plan, 1), 100)[:, 0]
    assert {tuple(row) for row in sums} < {tuple(row) for row in pictures.astype(float).sum((2, 3))}
    # Shards of the same layout with other numbers are other data.
    shard = next(Path(plan.data).glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100] + bytes(100))
    assert not np.array_equal(reference_features(network, quality._fresh(plan, 1), 100)[:, 0], sums)
    four = dataclasses.replace(plan, model=plan.model.replace(in_channels=4))
    with pytest.raises(InputError, match=r"model\.in_channels: expected the 3 of pictures .*, got 4"):
        measure_quality(DiT(four.model), plan.flow, four, FEW)


def test_pictures_of_pixels_in_shards_have_their_own_scale(pixel_shards, tmp_path, monkeypatch):
    pictures, plan = pixel_shards
    train(plan, tmp_path / "run")
    data = RunData.read(tmp_path / "run")
    scaled = (torch.from_numpy(to_float(pictures[:1])) - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(
        data.std
    ).view(3, 1, 1)
    monkeypatch.setattr(sampling, "draw_samples", lambda *_, **__: scaled)
    sample(run=tmp_path / "run", out=tmp_path / "x.png", count=1, device="cpu", as_json=True)
    with Image.open(tmp_path / "x.png") as sheet:
        assert np.array_equal(np.array(sheet.convert("RGB")).transpose(2, 0, 1), pictures[0])


def test_short_chains_are_drawn_in_as_many_steps(tmp_path, capsys):
    plan = dataclasses.replace(PLAN, objective=DDPM(timesteps=10, learn_sigma=False), images=16)
    train(plan, tmp_path / "run")
    sample(run=tmp_path / "run", out=tmp_path / "x.png", caption=["a red apple"], device="cpu", as_json=True)
    assert json.loads(capsys.readouterr().out)["steps"] == 10
    evaluate(runs=[tmp_path / "run"], samples=32, reference=40, threads=1, device="cpu", as_json=True)
    assert json.loads(capsys.readouterr().out)["sampler_steps"] == 10


def test_samples_are_guided_where_the_model_knows_no_condition_too(tmp_path, capsys):
    def guidance(run, **more):
        sample(run=run, out=tmp_path / "x.png", caption=["a red apple"], steps=1, device="cpu", as_json=True, **more)
        return json.loads(capsys.readouterr().out)["guidance"]

    for share, expected in ((0.1, 2.0), (0.0, 1.0)):
        run = tmp_path / str(share)
        train(dataclasses.replace(PLAN, images=16, condition_dropout=share), run)
        assert guidance(run) == guidance(run / "weights.safetensors") == expected
        assert guidance(run, guidance=3.0) == 3.0
    told = MODEL.replace(guidance_embed=True)
    save_weights(tmp_path / "told.safetensors", dict(DiT(told).named_parameters()), told, PLAN.flow)
    assert guidance(tmp_path / "told.safetensors") == 1.0


def test_options_that_would_do_nothing_are_refused(tmp_path):
    save_weights(tmp_path / "m.safetensors", dict(DiT(MODEL).named_parameters()), MODEL, PLAN.flow)
    given = {"run": tmp_path / "m.safetensors", "out": tmp_path / "x.png", "caption": ["a red apple"], "steps": 1}
    for more, named in (
        ({"count": 5}, "--count"),
        ({"guidance": 1.0, "guided_channels": 2}, "--guided-channels"),
        ({"text_encoder": tmp_path}, "--text-encoder"),
    ):
        with pytest.raises(InputError, match=named):
            sample(**given, **more, device="cpu")


def test_what_cannot_be_drawn_is_said_before_the_reference_is_made(monkeypatch):
    monkeypatch.setattr(quality, "reference_features", lambda *_, **__: pytest.fail("features were made"))
    with pytest.raises(InputError, match="samples: expected at least 32 to choose captions among, got 10"):
        measure_quality(DiT(MODEL), PLAN.flow, PLAN, dataclasses.replace(FEW, samples=10))
    with pytest.raises(InputError, match="steps: expected at most the chain's 10"):
        chain = DDPM(timesteps=10, learn_sigma=False)
        measure_quality(DiT(MODEL), chain, PLAN, dataclasses.replace(FEW, steps=11))


def test_a_device_that_is_not_here_is_named(tmp_path):
    for device, got in (("tpu", "'tpu'"), ("cuda", "cuda without a GPU")):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(InputError, match=f"--device: expected .*, got {got}"):
            evaluate(runs=[tmp_path], device=device)


@pytest.mark.parametrize("spec", ["vgg", "scenes:x", "clip", "inception:/nowhere/weights.pth", "clip:/nowhere"])
def test_networks_that_cannot_be_had_are_named(spec):
    with pytest.raises(InputError):
        open_network(spec)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("samples", 2),
        ("reference", 1.5),
        ("steps", 0),
        ("guidance", float("nan")),
        ("neighbours", "a"),
        ("neighbours", 2.5),
        ("neighbours", -1),
        ("sampler", "rk4"),
        ("guidance_interval", None),
        ("seed", "a"),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(InputError, match=field):
        QualitySettings(**{field: value})
