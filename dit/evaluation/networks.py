"""Feature networks by name: the embedded one, and Inception, CLIP and DINOv2 where their weights are on disk.

A distance on the features of one network is another quantity than on those of another, so every network carries a name and
the hash of its weights into the records.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ditscale.dit.encoding import library, loaded, model_kind, pretrained, weights_sha256
from ditscale.dit.evaluation.scene_network import NAME, scene_network, scene_network_sha256
from ditscale.dit.files import file_sha256
from ditscale.dit.foreign import read_tensors
from ditscale.errors import InputError

KINDS = ("scenes", "inception", "clip", "dinov2")
_MODEL_TYPES = {"clip": ("clip", "clip_vision_model"), "dinov2": ("dinov2", "dinov2_with_registers")}
# What transformers' processors of these models do where a folder holds no preprocessor_config.json.
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class FeatureNetwork:
    """What turns images into features.

    Attributes:
        name: in records, such as "ditscale-scenes-v1" or "clip:ViT-L-14"; "dinov2:large@224" where pictures are brought to
            another side than its position embedding was trained at.
        sha256: of its weights.
        features: from images uint8 [n, 3, H, W] to [n, d] float32.
        preparation: mean and deviation that pictures are brought to, for the cache: weights do not tell them. Default: none.
    """

    name: str
    sha256: str
    features: Callable[[Tensor], Tensor]
    preparation: str = ""


def open_network(spec: str, *, device: torch.device | str = "cpu") -> FeatureNetwork:
    """A feature network: "scenes", or "inception:FILE", "clip:FOLDER", "dinov2:FOLDER" with weights on disk.

    Args:
        spec: as above. Inception needs torch-fidelity and its weights file (pt_inception-2015-12-05-6726825d.pth); CLIP and
            DINOv2 need transformers and a folder as ``save_pretrained`` writes it.
        device: where it runs. Default: the CPU.

    Raises:
        InputError: no such network, a library that is not installed, or no such weights.
    """
    kind, _, place = spec.partition(":")
    if kind not in KINDS or (kind == "scenes") == bool(place):
        raise InputError(f"features: expected scenes, inception:FILE, clip:FOLDER or dinov2:FOLDER, got {spec!r}")
    if kind == "scenes":
        network = copy.deepcopy(scene_network()).to(device)  # the shared one stays on the CPU
        return FeatureNetwork(NAME, scene_network_sha256(), lambda images: network(as_floats(images, device)))
    if kind == "inception":
        return _inception(Path(place), device)
    return _vision_transformer(kind, Path(place), device)


def as_floats(images: Tensor, device: torch.device | str) -> Tensor:
    """Bytes to [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def _inception(path: Path, device: torch.device | str) -> FeatureNetwork:
    """The TensorFlow Inception of FID, by torch-fidelity; 2,048 features of its last pooling."""
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got {error.strerror or error}") from error
    fidelity: Any = library("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity")
    with tempfile.TemporaryDirectory() as folder:
        # It unpickles what it is given, so it is given a copy of the tensors alone.
        tensors = Path(folder) / path.name
        torch.save(read_tensors(path), tensors)
        settings = {"feature_extractor_weights_path": str(tensors)}
        network = loaded(path, lambda: fidelity.FeatureExtractorInceptionV3("inception", ["2048"], **settings))
    network = network.to(device).eval()
    return FeatureNetwork("inception-v3-fid", sha256, lambda images: network(images.to(device))[0].float())


def _vision_transformer(kind: str, folder: Path, device: torch.device | str) -> FeatureNetwork:
    """CLIP's image embedding, or DINOv2's normalised class token."""
    found = model_kind(folder, "model_type")
    if found not in _MODEL_TYPES[kind]:
        raise InputError(f"features: expected a {kind} model's folder, got model_type {found!r} in {folder}")
    transformers = library("transformers")
    class_name = "CLIPVisionModelWithProjection" if kind == "clip" else "AutoModel"
    network = pretrained(folder, getattr(transformers, class_name))
    network = network.to(device).eval().requires_grad_(False)
    trained = int(network.config.image_size)
    crop, mean, deviation = _preparation(folder, *(_CLIP if kind == "clip" else _IMAGENET))
    side = trained if crop is None or kind == "clip" else crop
    shift, scale = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (mean, deviation))

    def features(images: Tensor) -> Tensor:
        x = images.to(device).float() / 255
        x = F.interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
        out = network(pixel_values=(x - shift) / scale)
        return (out.image_embeds if kind == "clip" else out.pooler_output).float()

    # Features at another size are others: that of the position embedding goes without saying.
    size = "" if side == trained else f"@{side}"
    return FeatureNetwork(f"{kind}:{folder.name}{size}", weights_sha256(folder), features, f"{mean} {deviation}")


def _preparation(
    folder: Path, mean: Sequence[float], deviation: Sequence[float]
) -> tuple[int | None, Sequence[float], Sequence[float]]:
    """What a folder's preprocessor_config.json says, else None and the statistics given.

    What the processor would crop to is taken for the side of the whole picture, whose borders count too, as in the published
    distances on DINOv2's features (arXiv:2306.04675).
    """
    path = folder / "preprocessor_config.json"
    if not path.exists():
        return None, mean, deviation
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        crop = told.get("crop_size")
        side = crop.get("height") if isinstance(crop, dict) else crop
        return None if side is None else int(side), told.get("image_mean", mean), told.get("image_std", deviation)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: expected what prepares pictures, got {error}") from error
