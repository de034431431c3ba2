"""How good a trained model's images are, measured: samples drawn from its captions or labels beside images of its data."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from ditscale.cache import cached_path
from ditscale.dit.checks import is_whole, need_number
from ditscale.dit.condition import Condition, each
from ditscale.dit.data import EmojiScenes, ImageBatch, ImageShards, ImageStream, to_float
from ditscale.dit.evaluation.captions import CANDIDATES, caption_match
from ditscale.dit.evaluation.metrics import Features, Moments, frechet_distance, precision_recall
from ditscale.dit.evaluation.networks import FeatureNetwork, open_network
from ditscale.dit.extras import count_sampling
from ditscale.dit.files import keep
from ditscale.dit.model import DiT
from ditscale.dit.objective import Objective
from ditscale.dit.pictures import to_bytes
from ditscale.dit.rundata import RunData
from ditscale.dit.sampling import (
    default_clip,
    default_steps,
    draw_samples,
    guided_share,
    need_interval,
    need_sampler,
)
from ditscale.dit.seeds import seed_for
from ditscale.dit.training import TrainConfig, batch_tensors, open_stream
from ditscale.errors import InputError

# All that :func:`measure_quality` may enter into a run's record; what an earlier measurement left there is none of a later.
FIELDS = (
    "frechet_distance",
    "frechet_distance_real",
    "fid",
    "real_images",
    "real_reference_images",
    "precision",
    "recall",
    "caption_match",
    "caption_match_real",
    "caption_candidates",
    "feature_network",
    "feature_network_sha256",
    "quality_samples",
    "reference_images",
    "reference_data",
    "decoder",
    "decoder_sha256",
    "neighbours",
    "guidance",
    "guidance_interval",
    "sampler",
    "sampler_steps",
    "sampling_flops_per_image",
    "quality_seed",
)
_MOST = 10_000_000


@dataclass(frozen=True)
class QualitySettings:
    """What is drawn, and what it is compared with; all of it stands in the record.

    Args:
        samples: images to draw. Few samples raise the Fréchet distance; compare runs at equal numbers. Default: 2,000.
        reference: images of the data to compare with; a folder of fewer is taken whole. Default: 10,000.
        features: the network, see :func:`ditscale.dit.evaluation.networks.open_network`. Default: "scenes".
        sampler, steps, guidance, guidance_interval: see :func:`ditscale.dit.sampling.draw_samples`. Defaults: "heun", 25 or
            those of a shorter chain, 1 and all.
        neighbours: of precision and recall. Default: 3.
        seed: of prompts and noise. Default: 0.
        batch: images at a time. Default: 64.

    Raises:
        InputError: a value is not possible.
    """

    samples: int = 2000
    reference: int = 10_000
    features: str = "scenes"
    sampler: str = "heun"
    steps: int | None = None
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    neighbours: int = 3
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        bounds = {"neighbours": (1, _MOST), "steps": (1, _MOST), "batch": (1, _MOST), "seed": (-(2**63), 2**63 - 1)}
        for field, (least, most) in bounds.items():
            if field != "steps" or self.steps is not None:
                self._need_whole(field, least, most)
        for field in ("samples", "reference"):
            self._need_whole(field, self.neighbours + 1, _MOST)
        need_sampler(self.sampler)
        need_interval(self.guidance_interval)
        need_number("guidance", self.guidance)

    def _need_whole(self, field: str, least: int, most: int) -> None:
        value = getattr(self, field)
        if not is_whole(value, least, most):
            raise InputError(f"{field}: expected a whole number of at least {least}, at most {most:,}, got {value!r}")


@dataclass(frozen=True)
class Decoder:
    """What brings latents to pixels, those that a model draws and those of its data alike.

    Attributes:
        name, sha256: of the autoencoder and its weights, for records and the cache.
        decode: from latents [n, C, ...] as the model draws them to images [n, 3, ...], about [-1, 1].
        scaling: scale and shift of its latents, for the cache: its configuration has them, not its weights. Default: 1 and 0.
    """

    name: str
    sha256: str
    decode: Callable[[Tensor], Tensor]
    scaling: tuple[float, float] = (1.0, 0.0)


def measure_quality(
    model: DiT,
    objective: Objective,
    plan: TrainConfig,
    settings: QualitySettings | None = None,
    *,
    trained: RunData | None = None,
    decoder: Decoder | None = None,
    describe: Callable[[ImageBatch], Condition] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw samples and compare them with images of the run's data.

    Prompts are conditions of fresh images of the training data (for emoji scenes: scenes that were never trained on, of
    emoji that were). Each sample's noise follows from the seed and its number.

    Args:
        model: with the weights to judge, on ``device``.
        objective: that it was trained with.
        plan: of its run, which names the data.
        settings: Default: ``QualitySettings()``.
        trained: what its run knows of its data, by whose words captions are numbered. Default: none, the data's own.
        decoder: of a model of latents: samples and reference are both decoded, so that what is judged is the model and not
            the autoencoder. Default: none, the model draws pixels.
        describe: conditions as the model takes them, of images of the data. Default: their labels or words.
        device: Default: the CPU.
        progress: called with (samples done, samples). Default: None.

    Returns:
        A flat record: ``frechet_distance`` (``fid`` besides, where the features are Inception's), ``frechet_distance_real``
        (that of ``real_images`` real images to ``real_reference_images`` others, which no model can be expected to beat),
        ``precision``, ``recall``, for captioned emoji scenes ``caption_match``, and everything that they depend on.

    Raises:
        InputError: the data or the feature network cannot be had, the data are not those of ``trained``, there are too few
            samples to choose captions among, a model of latents comes without a decoder or one of pixels with one, or its
            pixels are not of three channels.
    """
    settings = settings or QualitySettings()
    latents = plan.model.latent_factor > 1
    if latents != (decoder is not None):
        kind = "an autoencoder for a model of latents" if latents else "no autoencoder for a model of pixels"
        raise InputError(f"vae: expected {kind}, got {'none' if decoder is None else decoder.name}")
    if decoder is None and plan.model.in_channels != 3:
        raise InputError(f"model.in_channels: expected the 3 of pictures to measure them, got {plan.model.in_channels}")
    steps = default_steps(objective) if settings.steps is None else settings.steps
    # What cannot be drawn is said before the features of thousands of images are made.
    share = guided_share(objective, steps=steps, sampler=settings.sampler, guidance_interval=settings.guidance_interval)
    network = open_network(settings.features, device=device)
    prompts, reference = (_fresh(plan, seed_for(settings.seed, use), trained) for use in ("prompts", "reference"))
    matched = type(prompts) is EmojiScenes and plan.model.condition == "caption"
    if matched and settings.samples < CANDIDATES:
        raise InputError(f"samples: expected at least {CANDIDATES} to choose captions among, got {settings.samples}")
    data = RunData.of(prompts) if trained is None else trained
    real, ours, theirs = _real_features(network, reference, settings, decoder)
    drawn, kept = [], []
    guidance = 1.0 if plan.model.condition == "none" else settings.guidance
    vocabulary = None if trained is None else trained.vocabulary
    described = describe or (lambda batch: batch_tensors(batch, plan.model, vocabulary)[1])
    for start, batch in _batches(prompts, settings.samples, settings.batch):
        noise = torch.stack([_noise(plan, settings.seed, start + i) for i in range(len(batch))]).to(device)
        y = each(described(batch), lambda tensor: tensor.to(device))
        images = draw_samples(
            model,
            noise,
            y,
            objective=objective,
            steps=steps,
            sampler=settings.sampler,
            guidance=guidance,
            guidance_interval=settings.guidance_interval,
            clip=default_clip(objective, plan.model, data),
            seed=[seed_for(settings.seed, f"sampler {start + i}") for i in range(len(batch))],
        )
        pixels = to_bytes(data.unscaled(images) if decoder is None else decoder.decode(images))
        drawn.append(_features(network, pixels))
        kept.append(pixels.cpu())
        if progress is not None:
            progress(start + len(batch), settings.samples)
    features = np.concatenate(drawn).astype(np.float64)
    precision, recall = precision_recall(_flat(real[: len(features)]), _flat(features), neighbours=settings.neighbours)
    distance = frechet_distance(Moments.of(_flat(features)), Moments.of(_flat(real)))
    cost = count_sampling(
        plan.model,
        steps=steps,
        sampler="heun" if settings.sampler == "heun" else "euler",
        guidance=guidance != 1 and not plan.model.guidance_embed,
        guided_share=share,
    )
    record: dict[str, Any] = {
        "frechet_distance": distance,
        "frechet_distance_real": frechet_distance(Moments.of(_flat(ours)), Moments.of(_flat(theirs))),
        "real_images": len(ours),
        "real_reference_images": len(theirs),
        "precision": precision,
        "recall": recall,
        "feature_network": network.name,
        "feature_network_sha256": network.sha256,
        "quality_samples": settings.samples,
        "reference_images": len(real),
        "reference_data": prompts.name,
        "decoder": None if decoder is None else decoder.name,
        "decoder_sha256": None if decoder is None else decoder.sha256,
        "neighbours": settings.neighbours,
        "guidance": guidance,
        "guidance_interval": list(settings.guidance_interval),
        "sampler": settings.sampler,
        "sampler_steps": steps,
        "sampling_flops_per_image": cost.forward,
        "quality_seed": settings.seed,
    }
    if network.name == "inception-v3-fid":
        record["fid"] = distance
    if matched:
        record |= caption_match(torch.cat(kept), prompts, seed=settings.seed)
    return record


def _real_features(
    network: FeatureNetwork, stream: ImageStream, settings: QualitySettings, decoder: Decoder | None
) -> tuple[Features, Features, Features]:
    """Features of the reference; and of two sets of real images that share none, the first as many as samples.

    Where the data are too few for a reference and as many images again as samples, the two sets are cut from the reference,
    and are smaller.
    """
    wanted = settings.reference + settings.samples
    every = reference_features(network, stream, wanted, decoder=decoder)
    reference = every[: settings.reference]
    held = min(settings.samples, max(len(every) - len(reference), len(every) // 2))
    split = len(every) - held
    return reference, every[split:], every[: min(split, len(reference))]


def reference_features(
    network: FeatureNetwork, stream: ImageStream, count: int, *, decoder: Decoder | None = None, batch: int = 256
) -> Features:
    """Features [count, frames, d] of a stream's first images, float64 of what was kept in float32.

    They are kept in the cache under the network's weights and preparation, the stream's identity, the count and the
    decoder's weights and scaling; a folder of fewer images is taken whole. Pixels that lie in shards as floats are brought
    back to the scale of pictures.
    """
    count = min(count, stream.unique_images or count)
    told = [network.name, network.sha256, network.preparation, stream.sha256, str(count)]
    # Shards are known by their layout; what lies in them is read in a fraction of the time that the network takes.
    content = hashlib.sha256()
    if isinstance(stream, ImageShards):
        for file in stream.files(0, count):
            content.update(file)
        told.append(content.hexdigest())
    elif stream.batch(0, 1).images.dtype == np.float32:
        for _, latents in _batches(stream, count, batch):
            content.update(latents.images.tobytes())
        told += [*([] if decoder is None else [decoder.sha256, repr(decoder.scaling)]), content.hexdigest()]
    key = hashlib.sha256(" ".join(told).encode()).hexdigest()[:24]
    path = cached_path("features", f"{key}.safetensors")
    if path is not None and path.exists():
        try:
            return safetensors.numpy.load(path.read_bytes())["frames"].astype(np.float64)
        except (OSError, KeyError, safetensors.SafetensorError):
            pass  # damaged: made again
    parts = []
    for _, images in _batches(stream, count, batch):
        pixels = torch.from_numpy(images.images)
        if decoder is not None:
            pixels = to_bytes(decoder.decode(torch.from_numpy(to_float(images.images))))
        elif pixels.is_floating_point():
            pixels = to_bytes(RunData.of(stream).unscaled(pixels))
        parts.append(_features(network, pixels))
    features = np.concatenate(parts)
    keep(path, safetensors.numpy.save({"frames": np.ascontiguousarray(features)}))
    return features.astype(np.float64)


@torch.no_grad()
def _features(network: FeatureNetwork, images: Tensor) -> NDArray[np.float32]:
    """[n, frames, d] of images [n, 3, H, W], one frame each, or of videos [n, 3, F, H, W]."""
    frames = images.transpose(1, 2) if images.ndim == 5 else images.unsqueeze(1)
    found: NDArray[np.float32] = network.features(frames.flatten(0, 1)).float().cpu().numpy()
    return found.reshape(*frames.shape[:2], -1)


def _flat(features: Features) -> Features:
    """Every frame by itself: [n * frames, d]."""
    return features.reshape(-1, features.shape[-1])


def _fresh(plan: TrainConfig, seed: int, trained: RunData | None = None) -> ImageStream:
    """The training data in another order, or other scenes of it; as they are, also where training mirrors half of them."""
    return open_stream(dataclasses.replace(plan, seed=seed, flip=False), "train", trained)


def _batches(stream: ImageStream, count: int, batch: int) -> Iterator[tuple[int, ImageBatch]]:
    for start in range(0, count, batch):
        yield start, stream.batch(start, min(batch, count - start))


def _noise(plan: TrainConfig, seed: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_for(seed, f"sample {number}"))
    return torch.randn(plan.model.input_shape, generator=generator)
