"""Frozen encoders around a latent, text-conditional model: autoencoders of diffusers, text encoders of transformers.

Both are read from folders on disk, from safetensors only, and never from the network.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditscale.dit.config import DiTConfig
from ditscale.dit.files import file_sha256
from ditscale.errors import InputError


@dataclass(frozen=True)
class Autoencoder:
    """A diffusers ``AutoencoderKL`` between pixels and the latents that a model is trained on.

    ``latent = (z - shift) * scale``, z the mean of the encoder's distribution or a sample of it; shift and scale are the
    autoencoder's own (0.18215 and 0 for Stable Diffusion 1, which the released DiT uses).

    Attributes:
        module: in evaluation mode, without gradients.
        scale, shift: as above.
        name, sha256: of the folder and of its weights, for records.
    """

    module: Any
    scale: float
    shift: float
    name: str
    sha256: str

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> Autoencoder:
        """Read a folder as ``AutoencoderKL.save_pretrained`` writes it, or one whose ``vae`` sub-folder is such.

        Raises:
            InputError: diffusers is not installed, or the folder is no such thing.
        """
        folder = Path(folder)
        name = folder.name
        if not (folder / "config.json").exists() and (folder / "vae" / "config.json").exists():
            folder = folder / "vae"
        kind = model_kind(folder, "_class_name")
        if kind != "AutoencoderKL":
            raise InputError(f"{folder}: expected an AutoencoderKL's folder, got that of {kind!r}")
        module = pretrained(folder, library("diffusers").AutoencoderKL)
        module = module.to(device).eval().requires_grad_(False)
        scale, shift = float(module.config.scaling_factor), float(module.config.shift_factor or 0.0)
        return cls(module, scale, shift, name, weights_sha256(folder))

    @property
    def factor(self) -> int:
        """Pixels on a side of a latent cell."""
        return 2 ** (len(self.module.config.block_out_channels) - 1)

    def check_model(self, config: DiTConfig) -> None:
        """Raise InputError where a model of this configuration draws no latents of this autoencoder."""
        if config.latent_factor == 1:
            raise InputError(f"vae: expected no autoencoder for a model of pixels, got {self.name}")
        wanted, got = (config.in_channels, config.latent_factor), (self.module.config.latent_channels, self.factor)
        if got != wanted:
            raise InputError(
                f"vae: expected latents of {wanted[0]} channels, {wanted[1]} pixels a side, as the model's, "
                f"got an autoencoder of {got[0]} channels and {got[1]} pixels in {self.name}"
            )

    @torch.no_grad()
    def encode(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Latents [n, C, h, w] of images [n, 3, H, W] in [-1, 1]: the mean, or with a generator a sample."""
        distribution = self.module.encode(images.to(self.module.dtype).to(self.module.device)).latent_dist
        z = distribution.mode() if generator is None else distribution.sample(generator)
        return (z.float() - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor, *, batch: int = 16) -> Tensor:
        """Images [n, 3, H, W] float32, about [-1, 1], of latents [n, C, h, w]; of videos [n, C, F, h, w] frame by frame."""
        if latents.ndim == 5:
            frames = latents.transpose(1, 2)
            return self.decode(frames.flatten(0, 1), batch=batch).unflatten(0, frames.shape[:2]).transpose(1, 2)
        z = (latents / self.scale + self.shift).to(self.module.dtype).to(self.module.device)
        return torch.cat([self.module.decode(part).sample.float() for part in z.split(batch)]).to(latents.device)


@dataclass(frozen=True)
class TextEncoder:
    """A CLIP text model or a T5 encoder of transformers, with its tokenizer.

    Attributes:
        module: in evaluation mode, without gradients.
        tokenizer: of the same folder.
        length: tokens of a caption at most, as the tokenizer says (CLIP: 77).
    """

    module: Any
    tokenizer: Any
    length: int

    @classmethod
    def load(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> TextEncoder:
        """Read a folder with a CLIP (text) model or a T5 (encoder) and its tokenizer, as ``save_pretrained`` writes them.

        Raises:
            InputError: transformers is not installed, or the folder is no such thing.
        """
        folder = Path(folder)
        kind = model_kind(folder, "model_type")
        classes = {
            "clip": "CLIPTextModel",
            "clip_text_model": "CLIPTextModel",
            "t5": "T5EncoderModel",
            "umt5": "UMT5EncoderModel",
        }
        if kind not in classes:
            raise InputError(f"{folder}: expected a CLIP or T5 model's folder, got model_type {kind!r}")
        transformers = library("transformers")
        module = pretrained(folder, getattr(transformers, classes[kind]))
        tokenizer = loaded(folder, lambda: transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
        if tokenizer.pad_token is None:
            raise InputError(f"{folder}: expected a tokenizer with a pad_token, got one without")
        longest = getattr(module.config, "max_position_embeddings", None) or tokenizer.model_max_length
        return cls(module.to(device).eval().requires_grad_(False), tokenizer, min(int(longest), 512))

    @torch.no_grad()
    def encode(self, captions: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Features [n, length, W] float32, rows of zeros behind a caption's end, and pooled vectors [n, W'] where there are.

        Args:
            captions: the texts; longer ones are cut.
            length: tokens. Default: the encoder's own.
        """
        length = self.length if length is None else length
        if not 1 <= length <= self.length:
            raise InputError(f"length: expected 1 to {self.length} tokens, got {length}")
        batch = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self.module.device)
        out = self.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        features = out.last_hidden_state.float() * batch.attention_mask.unsqueeze(-1)
        pooled = getattr(out, "pooler_output", None)
        return features.cpu(), None if pooled is None else pooled.float().cpu()

    def condition(self, captions: Sequence[str], config: DiTConfig) -> Tensor | tuple[Tensor, Tensor]:
        """Captions as a model of this configuration takes them.

        Raises:
            InputError: the encoder's widths are not those that the model was built for.
        """
        features, pooled = self.encode(captions, config.caption_tokens)
        if features.shape[-1] != config.caption_width:
            raise InputError(
                f"text encoder: expected features of width {config.caption_width}, got {features.shape[-1]}"
            )
        if not config.pooled_width:
            return features
        width = None if pooled is None else pooled.shape[-1]
        if pooled is None or width != config.pooled_width:
            raise InputError(f"text encoder: expected pooled vectors of width {config.pooled_width}, got {width}")
        return features, pooled


def library(module: str, package: str = "") -> Any:
    """An optional library's module; InputError with how to install it where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a build for another torch fails in its own way
        wanted = package or f"'ditscale[hub]', for {module}"
        raise InputError(f"{module}: expected it to be installed (pip install {wanted}), got {error}") from error


def weights_sha256(folder: Path) -> str:
    """Hash of the weights in a model's folder: that of its safetensors file, or of the hashes of several."""
    found = [file_sha256(path) for path in sorted(folder.glob("*.safetensors"))]
    return found[0] if len(found) == 1 else hashlib.sha256("".join(found).encode()).hexdigest()


def model_kind(folder: Path, field: str) -> str:
    """What a folder's config.json says of its model; InputError where it says nothing."""
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8"))[field])
    except KeyError:
        raise InputError(f"{folder}: expected a model's folder with a config.json that has {field}, got none") from None
    except (OSError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: expected a model's folder with a config.json, got {error}") from error


def pretrained(folder: Path, model_class: Any) -> Any:
    """A model of diffusers or transformers with the weights in a folder's safetensors.

    Raises:
        InputError: the folder cannot be read, or lacks a weight, which the library would draw at random.
    """
    settings = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    module, told = loaded(folder, lambda: model_class.from_pretrained(folder, **settings))
    missing = sorted(told["missing_keys"])
    if missing:
        raise InputError(f"{folder}: expected every weight of {type(module).__name__}, got no {missing[0]}")
    return module


def loaded(folder: Path, load: Any) -> Any:
    """What a library loads; whatever it raises is the folder's fault."""
    try:
        return load()
    except Exception as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{folder}: expected a model's folder, got {said}") from error
