"""One small configuration for every variant of DiT that is built, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ditscale.dit import DiT, DiTConfig

TINY: dict[str, Any] = {
    "image_size": 8, "latent_factor": 1, "in_channels": 3, "width": 24, "depth": 2, "heads": 3, "frequency_width": 16,
    "num_classes": 5, "caption_width": 6, "learn_sigma": False,
}  # fmt: skip
WORDS: dict[str, Any] = {"condition": "caption", "vocabulary_size": 11, "caption_tokens": 4}
FEATURES: dict[str, Any] = {"condition": "caption", "vocabulary_size": 0, "caption_tokens": 4}

VARIANTS: dict[str, dict[str, Any]] = {
    # The released DiT and SiT; patch 4 and learned variance change the layout of patches and channels.
    "adaln-zero": {"learn_sigma": True},
    "adaln-zero, words": {"condition": "caption", "vocabulary_size": 11},
    "adaln-zero, unconditional": {"condition": "none", "patch": 4, "learn_sigma": True},
    "adaln-zero, latents": {"in_channels": 4, "latent_factor": 2, "image_size": 16, "mlp_ratio": 2.5},
    "adaln-zero, wide image": {"image_width": 4, "in_channels": 2},
    "pooled caption of two layers": {"condition": "caption", "vocabulary_size": 11, "caption_layers": 2},
    # DiT's figure 5.
    "adaln": {"modulation": "adaln"},
    "in-context, label": {"modulation": "none", "context": "in-context"},
    "cross-attention, label": {"modulation": "none", "context": "cross-attention"},
    # The plain transformer of arXiv:2410.08184: image, caption and time in one sequence.
    "in-context, words": {"modulation": "none", "context": "in-context", **WORDS},
    "in-context, unconditional": {"modulation": "none", "context": "in-context", "condition": "none", "rope": True},
    "in-context with adaln-zero": {"context": "in-context", **FEATURES, "rope": True},
    # PixArt-alpha.
    "adaln-single": {"modulation": "adaln-single"},
    "adaln-single, cross-attention": {
        "modulation": "adaln-single", "context": "cross-attention", "cross_norm": False, "caption_layers": 2, **FEATURES,
    },
    "adaln-zero, cross-attention": {"context": "cross-attention", "qk_norm": "head", "kv_heads": 1, **WORDS},
    # SD3 and Flux.
    "joint": {"context": "joint", "pooled_width": 7, **FEATURES},
    "joint, words": {"context": "joint", "qk_norm": "head", "norm": "rms", **WORDS},
    "joint, then single": {
        "context": "joint", "single_depth": 2, "guidance_embed": True, "qk_norm": "head", "rope": True, "positions": "none",
        "pooled_width": 3, **FEATURES,
    },
    "joint, then single, swiglu": {
        "context": "joint", "single_depth": 1, "mlp": "swiglu", "kv_heads": 1, "rope": True, "depth": 1, **WORDS,
    },
    # LightningDiT's parts.
    "rms, swiglu, qk-norm, rope": {"norm": "rms", "mlp": "swiglu", "qk_norm": "head", "rope": True, "positions": "none"},
    "qk-norm over the width, learned positions": {"qk_norm": "width", "positions": "learned"},
    "grouped queries": {"kv_heads": 1},
    "rms of its own": {"modulation": "none", "context": "cross-attention", "norm": "rms", "qk_norm": "width", **WORDS},
    # Mixtures.
    "mixture": {"experts": 4},
    "mixture, one expert each, shared": {"experts": 3, "experts_per_token": 1, "shared_experts": 2, "mlp": "swiglu"},
    "mixture with room": {"experts": 4, "expert_capacity": 2.0, "moe_every": 2},
    "mixture without room": {"experts": 4, "experts_per_token": 3, "expert_capacity": 0.4, "mlp": "swiglu"},
    "mixture in context": {"experts": 3, "modulation": "adaln", "context": "in-context"},
    # Masking and routing: in training a block sees a share of the image's tokens.
    "routed": {"token_keep": [0.5, 1.0], "rope": True},
    "routed, to the end": {"token_keep": [1.0, 0.3, 0.3], "depth": 3, "experts": 2, "experts_per_token": 1},
    "routed, in context": {
        "token_keep": [0.6, 0.2], "rope": True, "modulation": "none", "context": "in-context", **WORDS,
    },
    # Video.
    "video": {"frames": 4, "patch_frames": 2, "image_size": 4, "rope": True},
    "video, space-time": {
        "frames": 3, "image_size": 4, "attention": "space-time", "modulation": "adaln-single", "context": "cross-attention",
        **WORDS,
    },
    "video, space-time, gated": {"frames": 2, "image_size": 4, "attention": "space-time", "rope": True},
    "video, alternating": {"frames": 3, "image_size": 4, "attention": "alternating", "positions": "learned", "rope": True},
    "video, alternating, plain": {
        "frames": 2, "image_size": 4, "image_width": 2, "attention": "alternating", "modulation": "none",
        "context": "cross-attention", "condition": "none",
    },
}  # fmt: skip


def config_of(name: str, **changes: Any) -> DiTConfig:
    return DiTConfig(**{**TINY, **VARIANTS[name], **changes})


def randomised(config: DiTConfig, seed: int = 0, scale: float = 0.1) -> DiT:
    """A model none of whose weights is zero, so that every path carries signal."""
    torch.manual_seed(seed)
    model = DiT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return model


def inputs_of(config: DiTConfig, count: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Any]:
    """x, t and y; captions with a gap and padding, without padding, and empty."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *config.input_shape, generator=generator)
    t = torch.tensor([0.5, 500.0, 999.0])[torch.arange(count) % 3]
    y: Any = None
    if config.condition == "class":
        y = torch.tensor([0, 4, 2])[torch.arange(count) % 3]
    elif config.condition == "caption":
        y = torch.tensor([[3, 0, 7, 0], [1, 2, 3, 4], [0, 0, 0, 0]])[torch.arange(count) % 3]
        if not config.vocabulary_size:
            features = torch.randn(count, config.caption_tokens, config.caption_width, generator=generator)
            y = features * (y != 0).unsqueeze(-1)
    if config.pooled_width:
        y = y, torch.randn(count, config.pooled_width, generator=generator)
    return x, t, y
