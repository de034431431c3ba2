"""The configuration: what it reads and writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ditscale.dit import DiTConfig
from ditscale.errors import InputError


def test_defaults_are_dit_xl_2() -> None:
    assert DiTConfig(patch=2) == DiTConfig.preset("DiT-XL/2")


def test_dictionary_and_json_round_trip() -> None:
    config = DiTConfig(depth=3, token_keep=[1, 0.5, 0.25], experts=4, name="mine")
    values = json.loads(json.dumps(config.to_dict()))
    assert values == config.to_dict()  # run hashes are taken over it: nothing may change on the way through JSON
    assert DiTConfig.from_dict(values) == config and DiTConfig.from_dict(values).name == "mine"
    assert config.token_keep == (1.0, 0.5, 0.25)


def test_older_records_still_read() -> None:
    """A record from before a field existed means the field's default."""
    old = {"image_size": 32, "latent_factor": 1, "in_channels": 3, "width": 64, "depth": 2, "heads": 2}
    assert DiTConfig.from_dict(old) == DiTConfig(**old)


def test_toml_with_a_preset_as_its_base(tmp_path: Path) -> None:
    page = tmp_path / "model.toml"
    page.write_text('[model]\npreset = "DiT-S/2"\nqk_norm = "head"\ntoken_keep = []\n')
    assert DiTConfig.from_toml(page) == DiTConfig.preset("DiT-S/2", qk_norm="head")
    page.write_text("width = ")
    with pytest.raises(InputError, match="TOML"):
        DiTConfig.from_toml(page)


def test_sizes() -> None:
    config = DiTConfig.preset("Wan2.1-1.3B")
    assert config.grid(config.image_size, config.image_width) == (21, 30, 52)
    assert config.tokens == 21 * 30 * 52 == 32760
    assert config.patch_width == 16 * 4 and config.mlp_width == 8960
    assert DiTConfig(heads=16, kv_heads=4).key_heads == 4
    square = DiTConfig()
    assert square.grid_side(512) == 32 and square.tokens == 256 and square.input_side == 32


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"width": 0}, "width"),
        ({"width": 1150}, "heads"),
        ({"width": 18, "heads": 2}, "width"),  # four parts of a sine-cosine position
        ({"heads": True}, "heads"),
        ({"image_size": 100}, "image_size"),
        ({"mlp_ratio": 1e308}, "mlp_ratio"),
        ({"experts": 4, "expert_capacity": 1e308}, "expert_capacity"),
        ({"experts": 4, "expert_capacity": 10**400}, "expert_capacity"),
        ({"name": 3}, "name"),
        ({"image_width": 100}, "image_width"),
        ({"frames": 3, "patch_frames": 2}, "frames"),
        ({"condition": "mood"}, "condition"),
        ({"modulation": "adaln-two"}, "modulation"),
        ({"context": "crossattention"}, "context"),
        ({"mlp": "relu"}, "mlp"),
        ({"norm": "batch"}, "norm"),
        ({"qk_norm": True}, "qk_norm"),
        ({"positions": "rope"}, "positions"),
        ({"attention": "window"}, "attention"),
        ({"kv_heads": 3}, "kv_heads"),
        ({"rope": True, "width": 12, "heads": 4}, "rope"),
        ({"rope": True, "width": 32, "heads": 16}, "rope"),  # rows would not be turned
        ({"rope": True, "width": 64, "frames": 2}, "rope"),
        ({"rope": 1}, "rope"),
        ({"num_classes": "a", "condition": "none"}, "num_classes"),
        ({"caption_width": -3}, "caption_width"),
        ({"num_classes": 0}, "num_classes"),
        ({"condition": "caption", "caption_width": 0}, "caption_width"),
        ({"caption_layers": 1.0}, "caption_layers"),
        ({"expert_capacity": "abc"}, "expert_capacity"),
        ({"expert_capacity": 1.5}, "expert_capacity"),  # without experts
        ({"experts_per_token": 9}, "experts_per_token"),
        ({"shared_experts": 2}, "shared_experts"),
        ({"moe_every": 9}, "moe_every"),
        ({"mlp_ratio": float("inf")}, "mlp_ratio"),
        ({"mlp_ratio": 0.0001}, "mlp_ratio"),
        ({"mlp_hidden": 0}, "mlp_hidden"),
        ({"frequency_width": 3}, "frequency_width"),
        ({"condition": "caption"}, "vocabulary_size"),
        ({"condition": "caption", "context": "joint"}, "caption_tokens"),
        ({"caption_layers": 3}, "caption_layers"),
        ({"modulation": "none"}, "context"),
        ({"modulation": "none", "context": "in-context", "pooled_width": 8}, "modulation"),
        ({"condition": "none", "context": "cross-attention"}, "condition"),
        ({"context": "joint", "modulation": "adaln"}, "modulation"),
        ({"single_depth": 2}, "single_depth"),
        ({"experts": 2, "experts_per_token": 3}, "experts_per_token"),
        ({"experts": 2, "context": "joint"}, "experts"),
        ({"experts": 2, "expert_capacity": 0}, "expert_capacity"),
        ({"attention": "space-time", "context": "in-context"}, "attention"),
        ({"token_keep": [0.5]}, "token_keep"),
        ({"token_keep": [0.0] * 28}, "token_keep"),
        ({"token_keep": "half"}, "token_keep"),
        ({"token_keep": [0.5] * 28, "context": "joint"}, "token_keep"),
        ({"mup_base_width": 0}, "mup_base_width"),
    ],
)
def test_impossible_values_are_named(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=rf"^{field}: expected"):
        DiTConfig(**changes)


def test_unknown_fields_and_presets_suggest_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean kv_heads"):
        DiTConfig.from_dict({"kvheads": 2})
    with pytest.raises(InputError, match="did you mean depth"):
        DiTConfig().replace(dept=2)
    with pytest.raises(InputError, match="nearest: DiT-XL/2"):
        DiTConfig.preset("DiT-XL2")
