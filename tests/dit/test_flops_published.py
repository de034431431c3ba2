"""What papers and released models state, beside what the ledger counts."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ditscale.dit import DiTConfig
from ditscale.dit.encoders import AUTOENCODERS
from ditscale.dit.flops import compare, count, count_sampling
from ditscale.dit.presets import preset_table
from ditscale.errors import InputError

# Peebles & Xie, arXiv:2212.09748, table 4 and section 5: "Gflops" as printed, in multiply-adds.
PRINTED = {
    "DiT-S/8": 0.36, "DiT-S/4": 1.41, "DiT-S/2": 6.06, "DiT-B/8": 1.42, "DiT-B/4": 5.56, "DiT-B/2": 23.01,
    "DiT-L/8": 5.01, "DiT-L/4": 19.70, "DiT-L/2": 80.71, "DiT-XL/8": 7.39, "DiT-XL/4": 29.05,
    "DiT-XL/2": 118.64,
}  # fmt: skip


@pytest.mark.parametrize("name", PRINTED)
def test_dit_paper_to_its_printed_digits(name: str) -> None:
    config = DiTConfig.preset(name)
    counted = count(config, image_size=256, convention="dit_paper_macs").forward / 1e9
    # One of the twelve is cut off instead of rounded.
    assert PRINTED[name] in (round(counted, 2), math.floor(100 * counted) / 100)
    assert count(config, image_size=256) == count(DiTConfig.preset(name.replace("DiT", "SiT")).replace(name=name))


def test_dit_paper_at_512() -> None:
    counted = count(DiTConfig.preset("DiT-XL/2"), image_size=512, convention="dit_paper_macs").forward / 1e9
    assert math.floor(100 * counted) / 100 == 524.60  # printed 524.60


def test_dit_paper_conditionings() -> None:
    """Section 3.2: adaLN adds least, in-context hardly more, cross-attention "roughly a 15% overhead"."""
    gmacs = {
        name: count(DiTConfig.preset(f"DiT-XL/2{name}"), convention="dit_paper_macs").forward / 1e9
        for name in ("", "-adaln", "-in-context", "-cross-attention")
    }
    assert gmacs["-adaln"] < gmacs[""] < gmacs["-in-context"] < 1.01 * gmacs["-adaln"]
    assert 1.15 < gmacs["-cross-attention"] / gmacs["-adaln"] < 1.17
    printed = {"": 118.6, "-adaln": 118.6, "-in-context": 119.4, "-cross-attention": 137.6}  # figure 5
    assert {name: round(value, 1) for name, value in gmacs.items()} == printed


# Parameters of the released weights, to the last one.
RELEASED = {
    "PixArt-alpha-512": 610_856_096,
    "SD3-2B": 2_028_328_000,
    "Flux-dev": 11_901_408_320,
    "Wan2.1-1.3B": 1_418_996_800,
    "Wan2.1-14B": 14_288_491_584,
    "DiT-XL/2": 675_129_632 - 294_912,  # the released file holds the fixed position table
}


@pytest.mark.parametrize("name", RELEASED)
def test_parameters_of_released_models(name: str) -> None:
    assert count(DiTConfig.preset(name)).params.total == RELEASED[name]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("DiT-S/2", 33), ("DiT-B/2", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675), ("Latte-XL/2", 673.68)],
)
def test_parameters_that_papers_round(name: str, millions: float) -> None:
    assert abs(count(DiTConfig.preset(name)).params.total / 1e6 - millions) < 0.5


def test_liang_ladder() -> None:
    """Width 64 x depth: 49,152 L^3 weights in the blocks (arXiv:2410.08184)."""
    for depth in range(2, 16):
        config = DiTConfig.preset(f"Liang-{depth}")
        report = count(config)
        assert report.params.body == 49_152 * depth**3
        assert report.context_tokens == 77
        rule = count(config, convention="liang_in_context")
        assert rule.train == 6 * report.params.total * (256 + 77 + 1)


def test_video_scaling_law_compute_per_token() -> None:
    """Yin et al., arXiv:2411.17470: 3/4 N (7 + n/d) a token, N = 16 L d^2; keys and values of the text left
    out.
    """
    layers, d = 3, 64
    config = DiTConfig(
        width=d, depth=layers, heads=2, image_size=64, frames=4, condition="caption", caption_width=8,
        caption_tokens=5,
        modulation="adaln-single", context="cross-attention", positions="none",
    )  # fmt: skip
    report = count(config)
    n = config.tokens
    names = [
        "attn.qkv",
        "attn.scores",
        "attn.values",
        "attn.proj",
        "cross.q",
        "cross.proj",
        "mlp.fc1",
        "mlp.fc2",
    ]
    counted = sum(sum(report.line(f"blocks.{name}")[3:5]) for name in names)
    params = 16 * layers * d**2
    assert counted * 4 * d == n * 3 * params * (7 * d + n)


def test_published_rules_are_off_by_what_they_leave_out() -> None:
    off = {
        size: {row.convention: row.off_percent for row in compare(DiTConfig.preset("DiT-XL/2"), size)}
        for size in (256, 512, 1024)
    }

    def at(name: str) -> list[float]:
        return [round(off[size][name], 2) for size in (256, 512, 1024)]

    assert at("matmul") == [0, 0, 0]
    assert at("hardware") == [0.59, 2.15, 6.20]
    assert at("6ND:total") == [45.64, 31.74, -4.99]
    assert at("6ND:body") == [-3.77, -12.95, -37.22]
    assert at("6ND+attention:body") == [-0.20, -0.05, -0.01]
    assert at("dit_paper_macs")[0] == -49.99
    assert at("chinchilla_f")[0] == -0.15


def test_chinchilla_terms_by_hand() -> None:
    config = DiTConfig.preset("DiT-S/8")
    t, d, layers, h, f = 16, 384, 12, 6, 1536
    block = 2 * t * 3 * d * d + 2 * t * t * d + 3 * h * t * t + 2 * t * t * d + 2 * t * d * d + 4 * t * d * f
    ends = 2 * t * 256 * d + 2 * t * d * 512
    report = count(config, convention="chinchilla_f")
    assert report.forward == layers * block + ends
    assert report.backward == 2 * report.forward


def test_recomputing_every_block_is_one_more_forward_of_the_blocks() -> None:
    """948.9245 and 23,273.1495 GFLOP were measured with torch's checkpoint around each block of a plain
    DiT-XL/2.
    """
    for size, measured in ((256, 948.9245), (1024, 23_273.1495)):
        report = count(DiTConfig.preset("DiT-XL/2"), size, recompute="block")
        assert round((report.train + report.recompute) / 1e9, 4) == measured
        hardware = count(DiTConfig.preset("DiT-XL/2"), size, recompute="block", convention="hardware")
        assert hardware.train == report.train + hardware.recompute > report.train + report.recompute


def test_autoencoder_and_sampling() -> None:
    """GFLOP of Stable Diffusion's autoencoder as torch's counter measured diffusers' model on the meta
    device.
    """
    autoencoder = AUTOENCODERS["sd"]
    measured = {256: (272.72, 622.19), 512: (1116.66, 2514.52)}
    for size, (encode, decode) in measured.items():
        assert round(autoencoder.encode(size, size) / 1e9, 2) == encode
        assert round(autoencoder.decode(size, size) / 1e9, 2) == decode
    xl = DiTConfig.preset("DiT-XL/2")
    drawn = count_sampling(xl, steps=250, autoencoder="sd")
    assert drawn.step == 500 * count(xl).forward + autoencoder.decode(256, 256)
    assert round(drawn.step / 1e12, 1) == 119.2
    assert count_sampling(xl, steps=10, sampler="heun", guidance=False).forward == 19 * count(xl).forward
    assert count_sampling(xl, steps=10, guided_share=0.5).forward == 15 * count(xl).forward


def test_every_preset_counts_and_round_trips() -> None:
    for name in preset_table():
        config = DiTConfig.preset(name)
        assert DiTConfig.from_dict(config.to_dict()) == config and config.name == name
        assert count(config).forward > 0


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"convention": "7ND"}, "convention"),
        ({"recompute": "some"}, "recompute"),
        ({"recompute": ["blocks.nothing"]}, "recompute"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"autoencoder": "sd9"}, "autoencoder"),
        ({"text_encoders": ["bert"]}, "text_encoders"),
        ({"lengths": []}, "lengths"),
        ({"lengths": [3, 0]}, "lengths"),
        ({"context_lengths": [3]}, "context_lengths"),
        ({"frames": 0}, "frames"),
        ({"image_size": (256, 255)}, "image_width"),
    ],
)
def test_impossible_arguments_are_named(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        count(DiTConfig.preset("DiT-S/2"), **changes)
