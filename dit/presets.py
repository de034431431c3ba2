"""Published models by name. Each entry holds the fields of :class:`ditscale.dit.DiTConfig` that differ from
its defaults.
"""

from __future__ import annotations

from typing import Any

Fields = dict[str, Any]

# Peebles & Xie, arXiv:2212.09748, table 1: depth, width, heads. SiT (Ma et al., arXiv:2401.08740) has the
# same models.
_DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
_DIT_PATCHES = (2, 4, 8)

# The conditionings that the DiT paper compares in its figure 5. In the two that have no modulation the time
# and the label are tokens.
_DIT_CONDITIONINGS: dict[str, Fields] = {
    "adaln": {"modulation": "adaln"},
    "in-context": {"modulation": "none", "context": "in-context"},
    "cross-attention": {"modulation": "none", "context": "cross-attention", "cross_norm": True},
}

# Chen et al., arXiv:2310.00426: DiT-XL/2 with adaLN-single and cross-attention to 120 T5-XXL features.
_PIXART: Fields = {
    "depth": 28,
    "width": 1152,
    "heads": 16,
    "condition": "caption",
    "caption_width": 4096,
    "caption_tokens": 120,
    "caption_layers": 2,
    "modulation": "adaln-single",
    "context": "cross-attention",
    "cross_norm": False,
}

# Esser et al., arXiv:2403.03206, the released 2B model: width 64 x depth; 77 CLIP and 77 T5 features side by
# side.
_SD3: Fields = {
    "image_size": 1024,
    "in_channels": 16,
    "depth": 24,
    "width": 1536,
    "heads": 24,
    "condition": "caption",
    "caption_width": 4096,
    "caption_tokens": 154,
    "pooled_width": 2048,
    "context": "joint",
    "learn_sigma": False,
}

# Black Forest Labs' released code (github.com/black-forest-labs/flux), FLUX.1-dev.
_FLUX: Fields = {
    "image_size": 1024,
    "in_channels": 16,
    "depth": 19,
    "single_depth": 38,
    "width": 3072,
    "heads": 24,
    "condition": "caption",
    "caption_width": 4096,
    "caption_tokens": 512,
    "pooled_width": 768,
    "guidance_embed": True,
    "context": "joint",
    "qk_norm": "head",
    "rope": True,
    "positions": "none",
    "learn_sigma": False,
}

# Wan 2.1 text-to-video (arXiv:2503.20314 and its released configurations): 81 frames are 21 latent ones,
# 480p.
_WAN: Fields = {
    "image_size": 480,
    "image_width": 832,
    "frames": 21,
    "in_channels": 16,
    "condition": "caption",
    "caption_width": 4096,
    "caption_tokens": 512,
    "caption_layers": 2,
    "modulation": "adaln-single",
    "context": "cross-attention",
    "cross_norm": True,
    "qk_norm": "width",
    "rope": True,
    "positions": "none",
    "learn_sigma": False,
}

# Ma et al., arXiv:2401.03048: DiT-XL/2 on 16 frames, blocks within frames and along time in turn.
_LATTE: Fields = {
    "depth": 28,
    "width": 1152,
    "heads": 16,
    "frames": 16,
    "attention": "alternating",
    "condition": "none",
}

# Liang et al., arXiv:2410.08184: "a vanilla Transformer design ... using a concatenation of image, text, and
# time tokens", 2 to 15 layers, width 64 x depth. The paper's resolution, autoencoder and caption length were
# not to be read anywhere: 256 px, the Stable Diffusion autoencoder and 77 CLIP features are assumptions.
_LIANG: Fields = {
    "condition": "caption",
    "caption_width": 768,
    "caption_tokens": 77,
    "modulation": "none",
    "context": "in-context",
    "learn_sigma": False,
}
_LIANG_DEPTHS = range(2, 16)


def preset_table() -> dict[str, Fields]:
    """Every preset's name and the fields it sets, ``name`` among them."""
    table: dict[str, Fields] = {}
    for family in ("DiT", "SiT"):
        for size, (depth, width, heads) in _DIT_SIZES.items():
            for patch in _DIT_PATCHES:
                table[f"{family}-{size}/{patch}"] = {
                    "depth": depth,
                    "width": width,
                    "heads": heads,
                    "patch": patch,
                }
    table |= {f"DiT-XL/2-{name}": {**table["DiT-XL/2"], **fields} for name, fields in _DIT_CONDITIONINGS.items()}
    table["PixArt-alpha-256"] = _PIXART
    table["PixArt-alpha-512"] = {**_PIXART, "image_size": 512}
    table["SD3-2B"] = _SD3
    table["Flux-dev"] = _FLUX
    table["Wan2.1-1.3B"] = {**_WAN, "depth": 30, "width": 1536, "heads": 12, "mlp_hidden": 8960}
    table["Wan2.1-14B"] = {**_WAN, "depth": 40, "width": 5120, "heads": 40, "mlp_hidden": 13824}
    table["Latte-XL/2"] = _LATTE
    for depth in _LIANG_DEPTHS:
        table[f"Liang-{depth}"] = {**_LIANG, "depth": depth, "width": 64 * depth, "heads": depth}
    return {name: {**fields, "name": name} for name, fields in table.items()}
