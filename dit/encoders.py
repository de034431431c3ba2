"""What stands around a latent diffusion model: autoencoders and text encoders, and what they cost. Integers,
no torch.

Convention ``matmul``: products of the convolutions, linear layers and attention. The encoders are frozen, so
there is no backward pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from ditscale.errors import InputError
from ditscale.kernels.attn import cost as attention_cost

Spec = TypeVar("Spec")


@dataclass(frozen=True)
class AutoencoderSpec:
    """A convolutional autoencoder in the layout of latent diffusion (Rombach et al., arXiv:2112.10752).

    Attributes:
        channels: of the first level.
        multipliers: channels of each level over that; each level but the last halves the image.
        resnets: residual blocks of an encoder level; the decoder has one more.
        latent_channels: of the latent; the encoder predicts twice as many.
        quantise: a 1 x 1 convolution stands after the encoder and before the decoder.
    """

    channels: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    resnets: int = 2
    latent_channels: int = 4
    quantise: bool = True

    @property
    def factor(self) -> int:
        """Pixels on a side of a latent cell."""
        return 1 << (len(self.multipliers) - 1)

    def _check(self, height: int, width: int) -> None:
        for name, side in (("image height", height), ("image width", width)):
            if side < 1 or side % self.factor:
                raise InputError(f"{name}: expected a multiple of {self.factor} for the autoencoder, got {side}")

    def encode(self, height: int, width: int) -> int:
        """FLOPs to encode one image of that size in pixels."""
        self._check(height, width)
        area, fan_in = height * width, self.channels
        flops = _convolution(area, 3, fan_in, 3)
        for level, multiplier in enumerate(self.multipliers):
            fan_out = self.channels * multiplier
            for _ in range(self.resnets):
                flops += _residual(area, fan_in, fan_out)
                fan_in = fan_out
            if level + 1 < len(self.multipliers):
                area //= 4
                flops += _convolution(area, fan_in, fan_in, 3)
        z = 2 * self.latent_channels
        flops += _middle(area, fan_in) + _convolution(area, fan_in, z, 3)
        return flops + (_convolution(area, z, z, 1) if self.quantise else 0)

    def decode(self, height: int, width: int) -> int:
        """FLOPs to decode one image of that size in pixels."""
        self._check(height, width)
        area, z = height * width // self.factor**2, self.latent_channels
        fan_in = self.channels * self.multipliers[-1]
        flops = (_convolution(area, z, z, 1) if self.quantise else 0) + _convolution(area, z, fan_in, 3)
        flops += _middle(area, fan_in)
        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            fan_out = self.channels * multiplier
            for _ in range(self.resnets + 1):
                flops += _residual(area, fan_in, fan_out)
                fan_in = fan_out
            if level:
                area *= 4
                flops += _convolution(area, fan_in, fan_in, 3)
        return flops + _convolution(area, fan_in, 3, 3)


@dataclass(frozen=True)
class TextEncoderSpec:
    """A transformer encoder of text.

    Attributes:
        layers, width, heads, head_width, hidden: its sizes; attention's inner width is ``heads *
            head_width``.
        gated: the feed-forward layer has three products instead of two (T5 v1.1).
        projection: width that one pooled vector is projected to; 0 for none.
    """

    layers: int
    width: int
    heads: int
    head_width: int
    hidden: int
    gated: bool = False
    projection: int = 0

    def encode(self, tokens: int) -> int:
        """FLOPs to encode one text of ``tokens`` tokens, padding among them."""
        if tokens < 1:
            raise InputError(f"text tokens: expected at least 1, got {tokens}")
        inner = self.heads * self.head_width
        layer = 2 * tokens * self.width * (4 * inner + self.hidden * (3 if self.gated else 2))
        layer += attention_cost.attention_flops_forward(1, self.heads, tokens, tokens, self.head_width)
        return self.layers * layer + 2 * self.width * self.projection


AUTOENCODERS: Final[Mapping[str, AutoencoderSpec]] = {
    "sd": AutoencoderSpec(),  # Stable Diffusion 1, 2 and XL
    "sd3": AutoencoderSpec(latent_channels=16, quantise=False),  # Stable Diffusion 3 and Flux
}
TEXT_ENCODERS: Final[Mapping[str, TextEncoderSpec]] = {
    "clip-l": TextEncoderSpec(12, 768, 12, 64, 3072),  # Radford et al., arXiv:2103.00020
    "clip-g": TextEncoderSpec(32, 1280, 20, 64, 5120, projection=1280),  # OpenCLIP bigG
    "t5-xxl": TextEncoderSpec(24, 4096, 64, 64, 10240, gated=True),  # T5 v1.1, encoder only; UMT5-XXL is the same
}


def find_spec(kind: str, name: str | Spec, known: Mapping[str, Spec]) -> Spec:
    """A specification by its name, or itself."""
    if not isinstance(name, str):
        return name
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.3)
        hint = f"; nearest: {near[0]}" if near else ""
        raise InputError(f"{kind}: expected one of {', '.join(known)}, got {name!r}{hint}")
    return known[name]


def _convolution(area: int, fan_in: int, fan_out: int, kernel: int) -> int:
    """A convolution with ``area`` output positions."""
    return 2 * area * fan_in * fan_out * kernel**2


def _residual(area: int, fan_in: int, fan_out: int) -> int:
    shortcut = _convolution(area, fan_in, fan_out, 1) if fan_in != fan_out else 0
    return _convolution(area, fan_in, fan_out, 3) + _convolution(area, fan_out, fan_out, 3) + shortcut


def _middle(area: int, width: int) -> int:
    """Two residual blocks around attention of one head over all positions."""
    attention = attention_cost.attention_flops_forward(1, 1, area, area, width)
    return 2 * _residual(area, width, width) + 4 * _convolution(area, width, width, 1) + attention
