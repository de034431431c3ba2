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
from torch import Tensor

from ditscale.cache import cached_path
from ditscale.dit.condition import Condition
from ditscale.dit.data import EmojiScenes, ImageBatch, ImageStream
from ditscale.dit.evaluation.captions import caption_match
from ditscale.dit.evaluation.metrics import Features, Moments, frechet_distance, precision_recall
from ditscale.dit.evaluation.networks import FeatureNetwork, open_network
from ditscale.dit.extras import count_sampling
from ditscale.dit.files import keep
from ditscale.dit.model import DiT
from ditscale.dit.objective import Objective, need_number
from ditscale.dit.sampling import draw_samples
from ditscale.dit.training import TrainConfig, batch_tensors, open_stream
from ditscale.dit.training.batches import seed_for
from ditscale.errors import InputError


@dataclass(frozen=True)
class QualitySettings:
    """What is drawn, and what it is compared with; all of it stands in the record.

    Args:
        samples: images to draw. Few samples raise the Fréchet distance; compare runs at equal numbers. Default: 2,000.
        reference: images of the data to compare with. Default: 10,000.
        features: the network, see :func:`ditscale.dit.evaluation.networks.open_network`. Default: "scenes".
        sampler, steps, guidance, guidance_interval: see :func:`ditscale.dit.sampling.draw_samples`. Defaults: "heun", 25, 1
            and all.
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
    steps: int = 25
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    neighbours: int = 3
    seed: int = 0
    batch: int = 64

    def __post_init__(self) -> None:
        for field, least in (
            ("samples", self.neighbours + 1),
            ("reference", self.neighbours + 1),
            ("steps", 1),
            ("batch", 1),
        ):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{field}: expected a whole number of at least {least}, got {value!r}")
        need_number("guidance", self.guidance)


def measure_quality(
    model: DiT,
    objective: Objective,
    plan: TrainConfig,
    settings: QualitySettings | None = None,
    *,
    decode: Callable[[Tensor], Tensor] | None = None,
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
        decode: brings what the model draws to images [n, 3, H, W] in [-1, 1]. Default: none, it draws pixels.
        describe: conditions as the model takes them, of images of the data. Default: their labels or words.
        device: Default: the CPU.
        progress: called with (samples done, samples). Default: None.

    Returns:
        A flat record: ``frechet_distance`` (``fid`` besides, where the features are Inception's), ``frechet_distance_real``
        (that of as many real images, which no model can be expected to beat), ``precision``, ``recall``, for captioned emoji
        scenes ``caption_match``, and everything that they depend on.

    Raises:
        InputError: the data or the feature network cannot be had, or the model draws latents.
    """
    settings = settings or QualitySettings()
    if plan.model.latent_factor > 1:  # the reference would be latents, which no feature network knows
        raise InputError(
            f"samples: expected a model of pixels to measure, got one of latents (latent_factor {plan.model.latent_factor})"
        )
    network = open_network(settings.features, device=device)
    prompts = _fresh(plan, seed_for(settings.seed, "prompts"))
    real = reference_features(network, _fresh(plan, seed_for(settings.seed, "reference")), settings.reference)
    twins = reference_features(network, prompts, settings.samples)
    drawn, odds = [], []
    described = describe or (lambda batch: batch_tensors(batch, plan.model)[1])
    for start, batch in _batches(prompts, settings.samples, settings.batch):
        noise = torch.stack([_noise(plan, settings.seed, start + i) for i in range(len(batch))]).to(device)
        y = _moved(described(batch), device)
        images = draw_samples(
            model,
            noise,
            y,
            objective=objective,
            steps=settings.steps,
            sampler=settings.sampler,
            guidance=settings.guidance if y is not None else 1.0,
            guidance_interval=settings.guidance_interval,
            clip=1.0 if objective.name == "ddpm" and decode is None else None,
            seed=seed_for(settings.seed, f"sampler {start}"),
        )
        pixels = to_bytes(images if decode is None else decode(images))
        with torch.no_grad():
            drawn.append(network.features(_frames(pixels)).double().cpu().numpy())
        odds.append(pixels)
        if progress is not None:
            progress(start + len(batch), settings.samples)
    features = np.concatenate(drawn)
    moments = Moments.of(real)
    precision, recall = precision_recall(real[: len(features)], features, neighbours=settings.neighbours)
    distance = frechet_distance(Moments.of(features), moments)
    cost = count_sampling(
        plan.model,
        steps=settings.steps,
        sampler="heun" if settings.sampler == "heun" else "euler",
        guidance=settings.guidance != 1,
    )
    record: dict[str, Any] = {
        "frechet_distance": distance,
        "frechet_distance_real": frechet_distance(Moments.of(twins), moments),
        "precision": precision,
        "recall": recall,
        "feature_network": network.name,
        "feature_network_sha256": network.sha256,
        "quality_samples": settings.samples,
        "reference_images": len(real),
        "reference_data": prompts.name,
        "neighbours": settings.neighbours,
        "guidance": settings.guidance,
        "guidance_interval": list(settings.guidance_interval),
        "sampler": settings.sampler,
        "sampler_steps": settings.steps,
        "sampling_flops_per_image": cost.forward,
        "quality_seed": settings.seed,
    }
    if network.name == "inception-v3-fid":
        record["fid"] = distance
    if type(prompts) is EmojiScenes and plan.model.condition == "caption":
        record |= caption_match(torch.cat(odds), prompts, seed=settings.seed)
    return record


def reference_features(network: FeatureNetwork, stream: ImageStream, count: int, *, batch: int = 256) -> Features:
    """Features [count, d] of a stream's first images, float64 of what was kept in float32.

    They are kept in the cache under the network's weights, the stream's identity and the count; a folder of fewer images is
    taken whole.
    """
    count = min(count, stream.unique_images or count)
    key = hashlib.sha256(f"{network.name} {network.sha256} {stream.sha256} {count}".encode()).hexdigest()[:24]
    path = cached_path("features", f"{key}.safetensors")
    if path is not None and path.exists():
        try:
            return safetensors.numpy.load(path.read_bytes())["features"].astype(np.float64)
        except (OSError, KeyError, safetensors.SafetensorError):
            pass  # damaged: made again
    parts = []
    with torch.no_grad():
        for _, images in _batches(stream, count, batch):
            parts.append(network.features(_frames(torch.from_numpy(images.images))).float().cpu().numpy())
    features = np.concatenate(parts)
    keep(path, safetensors.numpy.save({"features": np.ascontiguousarray(features)}))
    return features.astype(np.float64)


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to uint8, rounded and clipped, as a picture is stored."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _frames(images: Tensor) -> Tensor:
    """Every frame of a video as an image."""
    return images.transpose(1, 2).flatten(0, 1) if images.ndim == 5 else images


def _fresh(plan: TrainConfig, seed: int) -> ImageStream:
    """The training data in another order, or other scenes of it."""
    return open_stream(dataclasses.replace(plan, seed=seed), "train")


def _batches(stream: ImageStream, count: int, batch: int) -> Iterator[tuple[int, ImageBatch]]:
    for start in range(0, count, batch):
        yield start, stream.batch(start, min(batch, count - start))


def _noise(plan: TrainConfig, seed: int, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_for(seed, f"sample {number}"))
    return torch.randn(plan.model.input_shape, generator=generator)


def _moved(y: Condition, device: torch.device | str) -> Condition:
    from ditscale.dit.condition import each

    return each(y, lambda tensor: tensor.to(device))
