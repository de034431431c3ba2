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

from ditscale.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - the same reader under its older name
    import tomli as tomllib

CONDITIONS = ("class", "caption", "none")

# Peebles & Xie, arXiv:2212.09748, table 1: depth, width, heads.
_DIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
_DIT_PATCHES = (2, 4, 8)


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """A diffusion transformer with adaLN-zero conditioning (Peebles & Xie, arXiv:2212.09748).

    Args:
        image_size: side of the square image, in pixels. Default: 256.
        latent_factor: pixels a latent cell spans on a side; 8 for Stable Diffusion's autoencoder, 1 for a model
            that works on pixels. Default: 8.
        in_channels: channels of the model's input, 4 for latents and 3 for RGB. Default: 4.
        patch: side of a patch, in latent cells (pixels where ``latent_factor`` is 1). Default: 2.
        width: model width D. Default: 1152.
        depth: number of blocks L. Default: 28.
        heads: attention heads H; must divide ``width``. Default: 16.
        mlp_ratio: width of the feed-forward layer over D. Default: 4.0.
        condition: what the model is told besides the time: "class" (a label), "caption" (word tokens, averaged)
            or "none". Default: "class".
        num_classes: labels, where ``condition`` is "class"; one more row is kept for "no label". Default: 1000.
        vocabulary_size: words, where ``condition`` is "caption"; word 0 is padding. Default: 0.
        caption_width: width of the word table that a linear layer brings to D. Default: 64.
        learn_sigma: predict a variance beside the mean, which doubles the output channels. Default: True.
        frequency_width: sines and cosines that encode the time; even. Default: 256.
        mup_base_width: width at which the learning rate was tuned, for the maximal update parametrisation
            (arXiv:2203.03466, for DiT arXiv:2505.15270); None for the standard parametrisation. Default: None.
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
    name: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        for field in ("image_size", "latent_factor", "in_channels", "patch", "width", "depth", "heads"):
            _need_positive_int(field, getattr(self, field))
        if self.condition not in CONDITIONS:
            raise InputError(f"condition: expected one of {', '.join(CONDITIONS)}, got {self.condition!r}")
        if self.condition == "class":
            _need_positive_int("num_classes", self.num_classes)
        if self.condition == "caption":
            _need_positive_int("vocabulary_size", self.vocabulary_size)
            _need_positive_int("caption_width", self.caption_width)
        if self.width % self.heads:
            raise InputError(f"heads: expected a divisor of width {self.width}, got {self.heads}")
        if self.width % 4:
            # Two axes of sines and cosines share the width of the position table.
            raise InputError(f"width: expected a multiple of 4, got {self.width}")
        if isinstance(self.mlp_ratio, bool) or not isinstance(self.mlp_ratio, (int, float)):
            raise InputError(f"mlp_ratio: expected a number, got {self.mlp_ratio!r}")
        if not math.isfinite(self.mlp_ratio) or self.mlp_width < 1:
            raise InputError(f"mlp_ratio: expected a finite ratio that gives at least 1 unit, got {self.mlp_ratio!r}")
        _need_positive_int("frequency_width", self.frequency_width)
        if self.frequency_width % 2:
            raise InputError(f"frequency_width: expected an even number, got {self.frequency_width}")
        if self.mup_base_width is not None:
            _need_positive_int("mup_base_width", self.mup_base_width)
        self.grid_side(self.image_size)

    def grid_side(self, image_size: int) -> int:
        """Patches along a side of an ``image_size`` x ``image_size`` image, or InputError where it does not divide."""
        _need_positive_int("image_size", image_size)
        cell = self.latent_factor * self.patch
        if image_size % cell:
            raise InputError(
                f"image_size: expected a multiple of {cell} (latent_factor {self.latent_factor} x patch {self.patch}), "
                f"got {image_size}"
            )
        return image_size // cell

    @property
    def tokens(self) -> int:
        """Tokens T of one image at ``image_size``."""
        return self.grid_side(self.image_size) ** 2

    @property
    def input_side(self) -> int:
        """Side of the model's square input, in latent cells."""
        return self.image_size // self.latent_factor

    @property
    def mlp_width(self) -> int:
        """Width F of the feed-forward layer."""
        return int(self.width * self.mlp_ratio)

    @property
    def out_channels(self) -> int:
        """Channels that the model predicts."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def patch_width(self) -> int:
        """Numbers in one input patch."""
        return self.in_channels * self.patch**2

    def replace(self, **changes: Any) -> DiTConfig:
        """A copy with some fields changed, checked anew."""
        _need_known_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON or TOML."""
        return dataclasses.asdict(self)

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
        """Read a TOML file whose ``[model]`` table (or whole page) holds the fields; ``preset`` names a base."""
        return cls.from_table(read_toml(path), source=str(path))

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, source: str = "model") -> DiTConfig:
        """Build from a parsed table: its ``model`` table, or itself; ``preset`` names a base to change."""
        values = table.get("model", table)
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
        presets = preset_table()
        if not isinstance(name, str) or name not in presets:
            near = difflib.get_close_matches(str(name), presets, n=3, cutoff=0.3)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise InputError(f"model: expected a preset such as DiT-XL/2 or a TOML file, got {name!r}{hint}")
        return cls.from_dict({**presets[name], **changes})


def preset_table() -> dict[str, dict[str, Any]]:
    """Every preset's name and the fields it sets."""
    return {
        f"DiT-{size}/{patch}": {
            "depth": depth,
            "width": width,
            "heads": heads,
            "patch": patch,
            "name": f"DiT-{size}/{patch}",
        }
        for size, (depth, width, heads) in _DIT_SIZES.items()
        for patch in _DIT_PATCHES
    }


def read_toml(path: str | Path) -> dict[str, Any]:
    """Parse a TOML file; InputError where it cannot be read or is not TOML."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: expected a readable TOML file, got {error}") from error


def _need_positive_int(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{field}: expected a whole number of at least 1, got {value!r}")


def _need_known_fields(values: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(DiTConfig)}
    for field in values:
        if field not in known:
            near = difflib.get_close_matches(field, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"model.{field}: no such field{hint} (fields: {', '.join(sorted(known))})")
