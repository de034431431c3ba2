"""Autoencoders and text encoders from folders that the test writes: tiny, random, real loading code."""

from __future__ import annotations

import json
import shutil
import warnings

import numpy as np
import pytest
import safetensors.torch
import torch
from model_variants import config_of, randomised
from PIL import Image

from ditscale.dit import RectifiedFlow
from ditscale.dit.data import write_latents
from ditscale.dit.encoding import Autoencoder, TextEncoder
from ditscale.dit.image_commands import sample
from ditscale.dit.training import Execution, TrainConfig, train
from ditscale.dit.weights import save_weights
from ditscale.errors import InputError


def quietly(name):
    """A package whose own imports may warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    diffusers = quietly("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4, norm_num_groups=4, sample_size=16, scaling_factor=0.5, shift_factor=0.25,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder / "vae")
    return folder, model.eval()


def test_latents_are_the_scaled_means_and_come_back(vae_folder):
    folder, model = vae_folder
    vae = Autoencoder.load(folder)
    assert vae.factor == 2 and (vae.scale, vae.shift) == (0.5, 0.25)
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        mean = model.encode(images).latent_dist.mean
        latents = vae.encode(images)
        assert torch.allclose(latents, (mean - 0.25) * 0.5, atol=1e-6) and latents.shape == (3, 4, 8, 8)
        decoded = model.decode(mean).sample
    assert torch.allclose(vae.decode(latents, batch=2), decoded, atol=1e-5)
    one, other = (vae.encode(images, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    assert torch.equal(one, vae.encode(images, generator=torch.Generator().manual_seed(1)))
    assert not torch.allclose(one, other) and not torch.allclose(one, latents)
    video = torch.stack([latents, latents.flip(0)], 2)
    assert torch.allclose(vae.decode(video)[:, :, 1], decoded.flip(0), atol=1e-5)


def tokenizer_into(folder, words):
    tokenizers, transformers = quietly("tokenizers"), quietly("transformers")
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<end>", "<unk>", *words])}
    plain = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = Whitespace()
    plain.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", model_max_length=12
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    transformers = quietly("transformers")
    folder = tmp_path_factory.mktemp("t5")
    size = tokenizer_into(folder, ["a", "red", "apple", "left", "of", "cat"])
    torch.manual_seed(0)
    settings = transformers.T5Config(vocab_size=size, d_model=6, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    transformers = quietly("transformers")
    folder = tmp_path_factory.mktemp("clip")
    size = tokenizer_into(folder, ["a", "red", "apple", "left", "of", "cat"])
    torch.manual_seed(0)
    settings = transformers.CLIPTextConfig(
        vocab_size=size, hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=9, eos_token_id=1, pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    transformers.CLIPTextModel(settings).save_pretrained(folder)
    return folder


CAPTIONS = ["a red apple", "cat", "a cat left of a red apple left of a cat"]


def test_t5_features_are_padded_with_zeros_and_blind_to_padding(t5_folder):
    encoder = TextEncoder.load(t5_folder)
    features, pooled = encoder.encode(CAPTIONS, 6)
    assert features.shape == (3, 6, 6) and pooled is None and features.dtype is torch.float32
    assert not features[0, 4:].any() and not features[1, 2:].any() and bool(features[2].any(-1).all())
    alone, _ = encoder.encode(CAPTIONS[1:2], 3)
    assert torch.allclose(alone[0, :2], features[1, :2], atol=1e-5)


def test_clip_gives_features_and_a_pooled_vector(clip_folder):
    encoder = TextEncoder.load(clip_folder)
    assert encoder.length == 9
    features, pooled = encoder.encode(CAPTIONS)
    assert features.shape == (3, 9, 6) and pooled.shape == (3, 6)
    ids = encoder.tokenizer(CAPTIONS[:1], return_tensors="pt").input_ids
    with torch.no_grad():
        plain = encoder.module(input_ids=ids).last_hidden_state
    assert torch.allclose(features[0, : ids.shape[1]], plain[0], atol=1e-5)


def test_features_reach_the_models_they_fit(clip_folder, t5_folder):
    clip, t5 = TextEncoder.load(clip_folder), TextEncoder.load(t5_folder)
    joint = config_of("joint", pooled_width=6)
    features, pooled = clip.condition(CAPTIONS, joint)
    assert features.shape == (3, 4, 6) and pooled.shape == (3, 6)
    assert t5.condition(CAPTIONS, config_of("in-context with adaln-zero")).shape == (3, 4, 6)
    for encoder, config, named in (
        (t5, joint, "pooled vectors of width 6, got None"),
        (clip, joint.replace(caption_width=5), "features of width 5, got 6"),
        (clip, joint.replace(caption_tokens=10), "length: expected 1 to 9"),
    ):
        with pytest.raises(InputError, match=named):
            encoder.condition(CAPTIONS, config)


def test_captions_and_latents_go_through_the_command_line(tmp_path, vae_folder, t5_folder, capsys):
    config = config_of("adaln-single, cross-attention", in_channels=4, latent_factor=2, image_size=16)
    model = randomised(config)
    save_weights(tmp_path / "model.safetensors", dict(model.named_parameters()), config, RectifiedFlow())
    arguments = {"run": tmp_path / "model.safetensors", "out": tmp_path / "x.png", "steps": 2, "as_json": True}
    arguments |= {"caption": CAPTIONS[:2]}
    with pytest.raises(InputError, match="--vae"):
        sample(**arguments, text_encoder=t5_folder)
    with pytest.raises(InputError, match="--text-encoder"):
        sample(**arguments, vae=vae_folder[0])
    sample(**arguments, vae=vae_folder[0], text_encoder=t5_folder)
    assert json.loads(capsys.readouterr().out)["images"] == 2
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size == (16 + 2 + 16, 16)


def test_folders_that_hold_something_else_are_named(tmp_path, vae_folder, clip_folder):
    with pytest.raises(InputError, match=r"expected a model's folder with a config.json"):
        Autoencoder.load(tmp_path)
    with pytest.raises(InputError, match="expected an AutoencoderKL's folder|_class_name"):
        Autoencoder.load(clip_folder)
    with pytest.raises(InputError, match="that has model_type, got none"):
        TextEncoder.load(vae_folder[0] / "vae")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match="CLIP or T5"):
        TextEncoder.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x02cposix\nsystem\n")  # a pickle is not even opened
    with pytest.raises(InputError, match="expected a model's folder, got"):
        Autoencoder.load(tmp_path)


def test_weights_that_are_missing_are_named_and_not_drawn_at_random(tmp_path, vae_folder, t5_folder):
    for load, folder, gone in (
        (Autoencoder.load, vae_folder[0] / "vae", "decoder.conv_out.bias"),
        (TextEncoder.load, t5_folder, "encoder.final_layer_norm.weight"),
    ):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        (weights,) = copy.glob("*.safetensors")
        tensors = safetensors.torch.load_file(weights)
        del tensors[gone]
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
        with pytest.raises(InputError, match=f"expected every weight of .*, got no {gone}"):
            load(copy)


def test_another_autoencoder_s_folder_is_no_autoencoder_kl(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLTemporalDecoder"}))
    with pytest.raises(InputError, match="got that of 'AutoencoderKLTemporalDecoder'"):
        Autoencoder.load(tmp_path)


def test_a_tokenizer_without_padding_is_refused(tmp_path, t5_folder):
    shutil.copytree(t5_folder, tmp_path / "t5")
    path = tmp_path / "t5/tokenizer_config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in told.items() if name != "pad_token"}))
    with pytest.raises(InputError, match="expected a tokenizer with a pad_token"):
        TextEncoder.load(tmp_path / "t5")


def test_an_autoencoder_of_other_latents_is_named(vae_folder):
    vae = Autoencoder.load(vae_folder[0])
    latents = config_of("adaln-zero", in_channels=4, latent_factor=2, image_size=16)
    vae.check_model(latents)
    for changes, named in (
        (
            {"in_channels": 16},
            "vae: expected latents of 16 channels, 2 pixels a side, .* got .* 4 channels and 2 pixels",
        ),
        ({"latent_factor": 8, "image_size": 64}, "vae: expected latents of 4 channels, 8 pixels a side"),
        ({"latent_factor": 1}, "vae: expected no autoencoder for a model of pixels"),
    ):
        with pytest.raises(InputError, match=named):
            vae.check_model(latents.replace(**changes))


def test_pictures_on_the_way_need_the_autoencoder_of_the_latents(tmp_path, vae_folder):
    """Said before the first step."""
    write_latents(tmp_path / "data", [{"latents": np.ones((80, 4, 4, 4), np.float16)}], latent_factor=8)
    changes = {"condition": "none", "in_channels": 4, "latent_factor": 8, "image_size": 32, "patch": 2}
    config = TrainConfig(model=config_of("adaln-zero", **changes), data=str(tmp_path / "data"), images=64)
    with pytest.raises(InputError, match="vae: expected latents of 4 channels, 8 pixels a side"):
        train(config, tmp_path / "run", execution=Execution(sample_every=1, vae=str(vae_folder[0])))
    assert not (tmp_path / "run/config.json").exists()
