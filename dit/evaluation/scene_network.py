"""The embedded feature network: a small convolutional network that was trained to name what emoji scenes show.

It is no Inception: a distance on its 64 features compares runs on emoji scenes with each other and says nothing about other
images. It was trained by ``tools/train_scene_network.py`` on the embedded scenes of the training split.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import json

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditscale.dit.data import emoji_vocabulary

SIZE = 32
NAME = "ditscale-scenes-v1"
_ASSET = "scene_network.safetensors"


class SceneNetwork(nn.Module):
    """Images to 64 features, and features to the log-odds of a caption's words.

    Args:
        words: numbers of the words in :func:`ditscale.dit.data.emoji_vocabulary`, [W].
        base_rates: share of captions in which each occurs, [W].
    """

    words: Tensor
    base_rates: Tensor

    def __init__(self, words: Tensor, base_rates: Tensor) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        # (in, out, stride): 32 pixels to 4 on a side.
        for fan_in, fan_out, stride in ((3, 24, 1), (24, 32, 2), (32, 48, 1), (48, 64, 2), (64, 64, 1), (64, 96, 2)):
            layers += [nn.Conv2d(fan_in, fan_out, 3, stride, 1), nn.GroupNorm(8, fan_out), nn.GELU(approximate="tanh")]
        self.body = nn.Sequential(*layers)
        # Four quarters of the picture, so that left and right are told apart.
        self.features = nn.Linear(4 * 96, 64)
        self.head = nn.Linear(64, len(words))
        self.register_buffer("words", words)
        self.register_buffer("base_rates", base_rates)

    def forward(self, images: Tensor) -> Tensor:
        """Features [n, 64] of images [n, 3, H, W] in [-1, 1]; other sizes than 32 pixels are resampled."""
        if images.shape[-2:] != (SIZE, SIZE):
            images = F.interpolate(images, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        return self.features(F.adaptive_avg_pool2d(self.body(images), 2).flatten(1))

    def log_odds(self, features: Tensor) -> Tensor:
        """Log-odds [n, W] of each word of ``words``."""
        return self.head(features)


@functools.lru_cache(maxsize=1)
def scene_network() -> SceneNetwork:
    """The shipped network, for inference in float32."""
    return read_network(_asset())


def read_network(data: bytes) -> SceneNetwork:
    """A network from the bytes of its safetensors file."""
    tensors = safetensors.torch.load(data)
    network = SceneNetwork(tensors["words"].long(), tensors["base_rates"].float())
    network.load_state_dict({name: tensor if name == "words" else tensor.float() for name, tensor in tensors.items()})
    return network.eval().requires_grad_(False)


@functools.lru_cache(maxsize=1)
def scene_network_sha256() -> str:
    """Identity of the shipped weights."""
    return hashlib.sha256(_asset()).hexdigest()


def scene_network_card() -> dict[str, object]:
    """How the shipped network was trained, and what it can do."""
    length = int.from_bytes(_asset()[:8], "little")
    card: dict[str, object] = json.loads(json.loads(_asset()[8 : 8 + length])["__metadata__"]["ditscale"])
    return card


def _asset() -> bytes:
    return importlib.resources.files("ditscale.dit.evaluation").joinpath("assets").joinpath(_ASSET).read_bytes()


def word_targets(tokens: Tensor, words: Tensor) -> Tensor:
    """Which of ``words`` [W] each caption holds: [n, W] bool from tokens [n, K]."""
    present = torch.zeros(len(tokens), len(emoji_vocabulary()), dtype=torch.bool)
    present.scatter_(1, tokens, True)
    return present[:, words]
