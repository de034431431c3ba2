"""What a DiT is: one frozen dataclass, its presets, and its reading and writing. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditscale.dit.checks import is_number, need_choice, need_flag, need_whole
from ditscale.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same reader under its older name
    import tomli as tomllib

CONDITIONS = ("class", "caption", "none")
MODULATIONS = ("adaln-zero", "adaln", "adaln-single", "none")
CONTEXTS = ("pooled", "in-context", "cross-attention", "joint")
ATTENTIONS = ("full", "space-time", "alternating")
_OF_EXPERTS = ("experts_per_token", "expert_capacity", "shared_experts", "moe_every")
_MOST_RATIO = 1e9  # of the feed-forward width over D, and of an expert's rows over the even share


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A diffusion transformer: image or video, and every way of conditioning that ``ditscale.dit.flops`` can
    count.

    The defaults are a DiT with adaLN-zero (Peebles & Xie, arXiv:2212.09748). ``ditscale.dit.DiT`` builds and trains what
    is described here, but for what :meth:`need_trainable` refuses.

    Args:
        image_size: side of the square image, or height where ``image_width`` is given, in pixels. Default:
            256.
        latent_factor: pixels a latent cell spans on a side; 8 for Stable Diffusion's autoencoder, 1 for a
            model that works on pixels. Default: 8.
        in_channels: channels of the model's input, 4 for latents and 3 for RGB. Default: 4.
        patch: side of a patch, in latent cells (pixels where ``latent_factor`` is 1). Default: 2.
        width: model width D. Default: 1152.
        depth: number of blocks L. Default: 28.
        heads: attention heads H; must divide ``width``. Default: 16.
        mlp_ratio: width of the feed-forward layer over D. Default: 4.0.
        condition: what the model is told besides the time: "class" (a label), "caption" (word tokens,
            averaged) or "none". Default: "class".
        num_classes: labels, where ``condition`` is "class"; one more row is kept for "no label". Default:
            1000.
        vocabulary_size: words, where ``condition`` is "caption"; word 0 is padding. 0, where the caption
            enters as tokens: they are features of a frozen text encoder. Default: 0.
        caption_width: width of the word table, or of the text encoder's features, that is brought to D.
            Default: 64.
        learn_sigma: predict a variance beside the mean, which doubles the output channels. Only DDPM trains the second half:
            under rectified flow and EDM it is computed, and counted, but never read (so in the released SiT), and False is
            the cheaper model. Default: True.
        frequency_width: sines and cosines that encode the time; even. Default: 256.
        mup_base_width: width at which the learning rate was tuned, for the maximal update parametrisation
            (arXiv:2203.03466, for DiT arXiv:2505.15270); None for the standard parametrisation. It scales no attention
            logit, so models that share a learning rate must share the head width: let ``heads`` grow with ``width``.
            Default: None.
        modulation: what time (and a pooled condition) do in a block: "adaln-zero" (shift, scale and gate for
            each branch), "adaln" (no gates), "adaln-single" (one projection for all blocks and a small table
            in each, PixArt-alpha, arXiv:2310.00426) or "none" (the time is a token of the context). Default:
            "adaln-zero".
        context: how the condition enters: "pooled" (added to the time), "in-context" (tokens in the image's
            sequence), "cross-attention" (a third branch in each block) or "joint" (its own stream, MMDiT,
            arXiv:2403.03206). Default: "pooled".
        caption_tokens: tokens of a caption; 0 where it is pooled and its length does not matter. Default: 0.
        caption_layers: 1 for a linear layer from ``caption_width`` to D, 2 for Linear, GELU, Linear. Default:
            1.
        pooled_width: width of a pooled caption vector that Linear, SiLU, Linear add to the time (SD3, Flux);
            0 for none. Trained beside features only, not words. Default: 0.
        guidance_embed: the guidance scale is embedded like the time and added to it (Flux-dev). Default:
            False.
        single_depth: single-stream blocks (Flux) after the ``depth`` joint ones. Default: 0.
        mlp: "gelu" (two layers) or "swiglu" (three, the first two as one product). Default: "gelu".
        mlp_hidden: width F of the feed-forward layer, where ``mlp_ratio`` cannot say it. Default: None.
        norm: "layer" or "rms". Norms that are not modulated have a weight (LayerNorm: and a bias). Default:
            "layer".
        qk_norm: RMS norm of queries and keys: "none", "head" (over a head's width) or "width" (over all
            heads). Default: "none".
        kv_heads: key and value heads of grouped-query attention; divides ``heads``. Default: None, as many as
            ``heads``.
        positions: what is added to the patches: "sincos" (a fixed table), "learned" or "none". Default:
            "sincos".
        rope: rotary position embedding of queries and keys in self-attention; needs an even head width of at least 2
            numbers for each axis of the grid (2 axes, 3 with frames). Default: False.
        cross_norm: a norm stands before cross-attention (Wan; PixArt-alpha has none). Default: True.
        experts: feed-forward experts E of a mixture; 0 for a dense layer, where the four fields below stay at their
            defaults. Default: 0.
        experts_per_token: experts that a token goes to. Default: 2.
        expert_capacity: rows of an expert over the even share, rounded up; they are computed even where
            empty. Default: None, as many rows as tokens were sent there.
        shared_experts: experts that every token goes to besides. Default: 0.
        moe_every: every n-th block has the mixture, the others are dense; the n-th is the first. Default: 1.
        image_width: width of the image in pixels where it is not square. Default: None.
        frames: frames of the model's input (latent frames for a latent model). Default: 1.
        patch_frames: frames in a patch. Default: 1.
        attention: over all tokens ("full"); "space-time" (each block attends within frames, then along time,
            with its own weights); "alternating" (odd blocks along time, the others within frames; Latte,
            arXiv:2401.03048). Default: "full".
        token_keep: the share of the image's tokens that each block works on in training, one number a block (masking
            and routing): ``max(1, int(share * T))`` tokens, chosen anew for each noisy image; the others pass it by.
            Default: (), all.
        name: a label for people, not part of the model. Default: "".

    Raises:
        InputError: a value is not possible; names it, what was expected and what came.
    """

    image_size: int = 256
    latent_factor: int = 8
    in_channels: int = 4
    patch: int = 2
    width: int = 1152
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    condition: str = "class"
    num_classes: int = 1000
    vocabulary_size: int = 0
    caption_width: int = 64
    learn_sigma: bool = True
    frequency_width: int = 256
    mup_base_width: int | None = None
    modulation: str = "adaln-zero"
    context: str = "pooled"
    caption_tokens: int = 0
    caption_layers: int = 1
    pooled_width: int = 0
    guidance_embed: bool = False
    single_depth: int = 0
    mlp: str = "gelu"
    mlp_hidden: int | None = None
    norm: str = "layer"
    qk_norm: str = "none"
    kv_heads: int | None = None
    positions: str = "sincos"
    rope: bool = False
    cross_norm: bool = True
    experts: int = 0
    experts_per_token: int = 2
    expert_capacity: float | None = None
    shared_experts: int = 0
    moe_every: int = 1
    image_width: int | None = None
    frames: int = 1
    patch_frames: int = 1
    attention: str = "full"
    token_keep: tuple[float, ...] = ()
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        for field in (
            *("image_size", "latent_factor", "in_channels", "patch", "frames", "patch_frames"),
            *("width", "depth", "heads"),
            *("frequency_width", "experts_per_token", "moe_every"),
        ):
            need_whole(field, getattr(self, field), 1)
        for field in (
            *("num_classes", "caption_width", "vocabulary_size", "caption_tokens", "pooled_width"),
            *("single_depth", "experts", "shared_experts"),
        ):
            need_whole(field, getattr(self, field), 0)
        for field in ("mup_base_width", "mlp_hidden", "kv_heads", "image_width"):
            if getattr(self, field) is not None:
                need_whole(field, getattr(self, field), 1)
        for field in ("learn_sigma", "guidance_embed", "rope", "cross_norm"):
            need_flag(field, getattr(self, field))
        if not isinstance(self.name, str):
            raise InputError(f"name: expected a text, got {self.name!r}")
        need_choice("condition", self.condition, CONDITIONS)
        need_choice("modulation", self.modulation, MODULATIONS)
        need_choice("context", self.context, CONTEXTS)
        need_choice("attention", self.attention, ATTENTIONS)
        need_choice("mlp", self.mlp, ("gelu", "swiglu"))
        need_choice("norm", self.norm, ("layer", "rms"))
        need_choice("qk_norm", self.qk_norm, ("none", "head", "width"))
        need_choice("positions", self.positions, ("sincos", "learned", "none"))
        if type(self.caption_layers) is not int or self.caption_layers not in (1, 2):
            raise InputError(f"caption_layers: expected 1 or 2, got {self.caption_layers!r}")
        self._check_widths()
        self._check_condition()
        self._check_blocks()
        frames, _, _ = self.grid(self.image_size, self.image_width)
        axes = 3 if frames > 1 and self.attention == "full" else 2
        if self.rope and self.width // self.heads < 2 * axes:
            # An axis without a pair of numbers would not be turned: its places would be all the same.
            raise InputError(
                f"rope: expected a head width of at least {2 * axes}, a pair of numbers for each of {axes} axes, "
                f"got {self.width // self.heads}"
            )

    def _check_widths(self) -> None:
        if self.width % self.heads:
            raise InputError(f"heads: expected a divisor of width {self.width}, got {self.heads}")
        if self.heads % self.key_heads:
            raise InputError(f"kv_heads: expected a divisor of heads {self.heads}, got {self.kv_heads}")
        if self.positions == "sincos" and self.width % 4:
            # Two axes of sines and cosines share the width of the position table.
            raise InputError(f"width: expected a multiple of 4, got {self.width}")
        if self.rope and self.width // self.heads % 2:
            raise InputError(f"rope: expected an even head width, got {self.width // self.heads}")
        if isinstance(self.mlp_ratio, bool) or not isinstance(self.mlp_ratio, (int, float)):
            raise InputError(f"mlp_ratio: expected a number, got {self.mlp_ratio!r}")
        if not 0 < self.mlp_ratio <= _MOST_RATIO or self.mlp_width < 1:
            raise InputError(
                f"mlp_ratio: expected a finite ratio of at most {_MOST_RATIO:g} that gives at least 1 unit, "
                f"got {self.mlp_ratio!r}"
            )
        if self.frequency_width % 2:
            raise InputError(f"frequency_width: expected an even number, got {self.frequency_width}")

    def _check_condition(self) -> None:
        if self.condition == "class":
            need_whole("num_classes", self.num_classes, 1)
        if self.condition == "caption":
            need_whole("caption_width", self.caption_width, 1)
            needed = "vocabulary_size" if self.context == "pooled" else "caption_tokens"
            need_whole(needed, getattr(self, needed), 1)
        if self.modulation == "none" and self.context not in ("in-context", "cross-attention"):
            raise InputError(
                f"context: expected in-context or cross-attention where modulation is none, got {self.context!r}"
            )
        if self.modulation == "none" and (self.pooled_width or self.guidance_embed):
            raise InputError("modulation: expected one that a pooled vector can be added to, got 'none'")
        if self.context != "pooled" and self.modulation != "none" and self.condition == "none":
            raise InputError(f"condition: expected class or caption where context is {self.context}, got 'none'")
        if self.context == "joint" and self.modulation != "adaln-zero":
            raise InputError(f"modulation: expected adaln-zero where context is joint, got {self.modulation!r}")
        if self.single_depth and self.context != "joint":
            raise InputError(f"single_depth: expected 0 where context is {self.context}, got {self.single_depth}")

    def _check_blocks(self) -> None:
        capacity = self.expert_capacity
        if capacity is not None and not (is_number(capacity) and 0 < capacity <= _MOST_RATIO):
            raise InputError(f"expert_capacity: expected a number above 0, at most {_MOST_RATIO:g}, got {capacity!r}")
        if not self.experts:
            for field in dataclasses.fields(self):
                got = getattr(self, field.name)
                if field.name in _OF_EXPERTS and got != field.default:
                    raise InputError(f"{field.name}: expected {field.default} where experts is 0, got {got!r}")
        elif self.experts_per_token > self.experts:
            raise InputError(f"experts_per_token: expected at most {self.experts}, got {self.experts_per_token}")
        elif self.context == "joint":
            raise InputError(f"experts: expected 0 where context is joint, got {self.experts}")
        if self.attention != "full" and self.context not in ("pooled", "cross-attention"):
            raise InputError(f"attention: expected full where context is {self.context}, got {self.attention!r}")
        shares = self.token_keep
        if not isinstance(shares, (tuple, list)) or not all(is_number(s) and 0 < s <= 1 for s in shares):
            raise InputError(f"token_keep: expected shares above 0 and up to 1, got {shares!r}")
        object.__setattr__(self, "token_keep", tuple(float(share) for share in shares))
        if shares and len(shares) != self.depth:
            raise InputError(f"token_keep: expected {self.depth} shares, one a block, got {len(shares)}")
        if shares and (self.attention != "full" or self.context == "joint"):
            raise InputError("token_keep: expected none where context is joint or attention is not full, got some")

    def need_trainable(self) -> None:
        """Raise InputError where a field asks for what can be counted but not built and trained here."""
        if self.pooled_width and self.condition != "caption":
            raise InputError(
                f"pooled_width: expected 0 for a model of condition {self.condition}, got {self.pooled_width}"
            )
        if self.pooled_width and self.vocabulary_size:
            raise InputError(
                f"pooled_width: expected 0 where vocabulary_size is above 0, as no data hold words and pooled vectors, "
                f"got {self.pooled_width}"
            )

    def grid_side(self, image_size: int) -> int:
        """Patches along a side of an ``image_size`` x ``image_size`` image, or InputError where it does not
        divide.
        """
        return self.grid(image_size)[1]

    def grid(self, image_size: int, image_width: int | None = None, frames: int | None = None) -> tuple[int, int, int]:
        """Patches along time, height and width, or InputError where one does not divide.

        Args:
            image_size: height in pixels.
            image_width: width in pixels. Default: ``image_size``.
            frames: of the model's input. Default: ``self.frames``.
        """
        cell = self.latent_factor * self.patch
        sides = {"image_size": image_size, "image_width": image_size if image_width is None else image_width}
        for field, side in sides.items():
            need_whole(field, side, 1)
            if side % cell:
                raise InputError(
                    f"{field}: expected a multiple of {cell} "
                    f"(latent_factor {self.latent_factor} x patch {self.patch}), "
                    f"got {side}"
                )
        frames = self.frames if frames is None else frames
        need_whole("frames", frames, 1)
        if frames % self.patch_frames:
            raise InputError(f"frames: expected a multiple of patch_frames {self.patch_frames}, got {frames}")
        return frames // self.patch_frames, sides["image_size"] // cell, sides["image_width"] // cell

    @property
    def tokens(self) -> int:
        """Tokens T of one image or video of the configured size."""
        return math.prod(self.grid(self.image_size, self.image_width))

    @property
    def input_side(self) -> int:
        """Side of the model's square input, in latent cells."""
        return self.image_size // self.latent_factor

    @property
    def is_video(self) -> bool:
        """The input has an axis of frames."""
        return self.frames > 1 or self.patch_frames > 1

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input: (C, H, W) in latent cells, or (C, frames, H, W) for video."""
        width = self.image_size if self.image_width is None else self.image_width
        sides = (self.image_size // self.latent_factor, width // self.latent_factor)
        return (self.in_channels, self.frames, *sides) if self.is_video else (self.in_channels, *sides)

    @property
    def mlp_width(self) -> int:
        """Width F of the feed-forward layer."""
        return int(self.width * self.mlp_ratio) if self.mlp_hidden is None else self.mlp_hidden

    @property
    def key_heads(self) -> int:
        """Key and value heads."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def out_channels(self) -> int:
        """Channels that the model predicts."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def patch_width(self) -> int:
        """Numbers in one input patch."""
        return self.in_channels * self.patch_frames * self.patch**2

    def replace(self, **changes: Any) -> DiTConfig:
        """A copy with some fields changed, checked anew."""
        _need_known_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON or TOML."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {"token_keep": list(self.token_keep)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiTConfig:
        """The inverse of :meth:`to_dict`; unknown fields raise InputError."""
        _need_known_fields(values)
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"model: {error}") from error

    @classmethod
    def from_toml(cls, path: str | Path) -> DiTConfig:
        """Read a TOML file whose ``[model]`` table (or whole page) holds the fields; ``preset``: its base."""
        return cls.from_table(read_toml(path), source=str(path))

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, source: str = "model") -> DiTConfig:
        """Build from a parsed table: its ``model`` table, or itself; ``preset`` names a base to change."""
        values = table.get("model", table) if isinstance(table, Mapping) else table
        if not isinstance(values, Mapping):
            raise InputError(f"{source}: expected [model] to be a table, got {type(values).__name__}")
        values = dict(values)
        preset = values.pop("preset", None)
        return cls.from_dict(values) if preset is None else cls.preset(preset, **values)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DiTConfig:
        """A published model by its name, such as "DiT-XL/2"; ``changes`` replace fields of it.

        Raises:
            InputError: no preset of that name; lists the nearest.
        """
        from ditscale.dit.presets import preset_table

        presets = preset_table()
        if not isinstance(name, str) or name not in presets:
            near = difflib.get_close_matches(str(name), presets, n=3, cutoff=0.3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise InputError(f"model: expected a preset such as DiT-XL/2 or a TOML file, got {name!r}{hint}")
        return cls.from_dict({**presets[name], **changes})


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file; InputError where it cannot be read or is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: expected a readable TOML file, got {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected a readable TOML file, got {error}") from error


def _need_known_fields(values: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(DiTConfig)}
    for field in values:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"model.{field}: no such field{hint} (fields: {', '.join(sorted(known))})")
