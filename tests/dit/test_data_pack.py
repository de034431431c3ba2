"""The embedded emoji: whole, licensed, split without a leak, and refused when damaged."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ditscale.dit.data import load_pack
from ditscale.dit.data.pack import ASSETS, CATEGORIES, SHA256
from ditscale.errors import InputError


def test_pack_holds_every_picture_once() -> None:
    pack = load_pack()
    assert pack.sprites.shape == (3781, 32, 4, 32) and pack.sprites.dtype == np.uint8
    rows = [emoji.first + j for emoji in pack.emoji for j in range(len(emoji.tones))]
    assert sorted(rows) == list(range(3781))
    codes = [code for emoji in pack.emoji for code in emoji.codepoints]
    assert len(set(codes)) == len(codes) == 3781
    assert {emoji.category for emoji in pack.emoji} == set(CATEGORIES)


def test_colour_is_multiplied_by_alpha() -> None:
    pixels = load_pack().pixels
    assert (pixels[:, :3] <= pixels[:, 3:]).all()
    # Every picture covers something, and none is a full opaque square: the margins survived.
    cover = (pixels[:, 3] > 127).mean(axis=(1, 2))
    assert cover.min() > 0.005 and cover.max() < 1


def test_known_emoji_are_what_their_names_say() -> None:
    """Colour of the covered area, by name: a shifted row table would show here and nowhere else."""
    pack = load_pack()
    by_name = {emoji.name: emoji for emoji in pack.emoji}
    # (name, strongest channel): pure colours, far apart in the table.
    for name, channel in (("red apple", 0), ("green heart", 1), ("blue circle", 2), ("red square", 0)):
        picture = pack.pixels[by_name[name].first].astype(float)
        assert int(np.argmax(picture[:3].sum(axis=(1, 2)))) == channel, name
    dark = by_name["waving hand"]
    light = [pack.pixels[dark.first + j][:3].sum() for j in (1, 5)]
    assert dark.tones[1] == "light skin" and dark.tones[5] == "dark skin" and light[0] > light[1]
    assert dark.phrase(5) == "a waving hand with dark skin"
    assert by_name["red apple"].phrase(kind=True) == "a red apple (fruit)"
    assert by_name["cat face"].phrase() == "a cat face" and by_name["eyes"].phrase() == "eyes"


def test_names_are_clean_words() -> None:
    for emoji in load_pack().emoji:
        assert emoji.name == " ".join(emoji.name.lower().split()) and emoji.name.isascii()
        assert set(emoji.name) <= set("abcdefghijklmnopqrstuvwxyz0123456789' "), emoji.name
        assert emoji.article in ("", "a", "an", "the")
        assert emoji.kind


def test_names_are_unique() -> None:
    counts = Counter(emoji.name for emoji in load_pack().emoji)
    assert [name for name, count in counts.items() if count > 1] == []


def test_splits_share_no_emoji_and_no_group() -> None:
    pack = load_pack()
    train, validation = pack.split("train"), pack.split("validation")
    assert len(train) + len(validation) == len(pack.emoji)
    assert 0.04 < len(validation) / len(pack.emoji) < 0.06
    assert not {e.group for e in train} & {e.group for e in validation}
    assert {e.category for e in validation} == set(CATEGORIES)


def test_variants_of_a_person_stay_together() -> None:
    groups = {emoji.name: emoji.group for emoji in load_pack().emoji}
    for a, b in (
        ("man cook", "woman cook"),
        ("person running", "woman running facing right"),
        ("mermaid", "merman"),
    ):
        assert groups[a] == groups[b]
    # Not a word in common, the same picture: only the perceptual distance can tell.
    for a, b in (
        ("flag of norway", "flag of bouvet island"),
        ("stop sign", "red circle"),
        ("new moon", "black circle"),
    ):
        assert groups[a] == groups[b]


def test_no_held_out_picture_resembles_a_training_picture() -> None:
    """Root mean square distance over the covered area, margins removed, straight and mirrored; anew here.

    The builder promises 0.15 at 16 px. This test scales by nearest pixels, so it asks for a little less: 0.12
    still lies above what separates a clock's faces (0.04) or a snowman with and without snow (0.12).
    """
    pack = load_pack()

    def framed(row: int) -> np.ndarray:
        picture = pack.pixels[row].astype(np.float32) / 255
        ys, xs = np.nonzero(picture[3] > 16 / 255)
        half = (max(np.ptp(ys), np.ptp(xs)) + 1) / 2
        at = (np.arange(16) + 0.5) / 16 * 2 * half - half
        rows = np.floor((ys.min() + ys.max() + 1) / 2 + at).astype(int)
        columns = np.floor((xs.min() + xs.max() + 1) / 2 + at).astype(int)
        inside = ((rows >= 0) & (rows < 32))[:, None] & ((columns >= 0) & (columns < 32))
        return picture[:, rows.clip(0, 31)[:, None], columns.clip(0, 31)] * inside

    def views(x: np.ndarray) -> np.ndarray:
        return np.concatenate([x[:, :3], x[:, :3] + 1 - x[:, 3:]], axis=1).reshape(len(x), -1)

    rows = {
        split: [e.first + j for e in pack.split(split) for j in range(len(e.tones))]  # type: ignore[arg-type]
        for split in ("train", "validation")
    }
    train = np.stack([framed(row) for row in rows["train"]])
    held = np.stack([framed(row) for row in rows["validation"]])
    for other in (held, held[..., ::-1]):
        a, b = views(other), views(train)
        squared = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
        cover, over = other[:, 3].reshape(len(other), -1), train[:, 3].reshape(len(train), -1)
        union = cover.sum(1)[:, None] + over.sum(1) - cover @ over.T
        assert np.sqrt(np.maximum(squared, 0) / (6 * union)).min() > 0.12


@pytest.mark.parametrize("name", sorted(SHA256))
def test_damaged_asset_is_refused(tmp_path: Path, name: str) -> None:
    for file in SHA256:
        shutil.copy(ASSETS / file, tmp_path / file)
    data = bytearray((ASSETS / name).read_bytes())
    data[len(data) // 2] ^= 1  # one bit, in the middle: the zip directory at the end stays whole
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=rf"{name}: expected sha256 .* damaged") as error:
        load_pack.__wrapped__(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_asset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="emoji.npz: expected an embedded data file"):
        load_pack.__wrapped__(tmp_path)


def test_licences_lie_beside_the_data() -> None:
    attribution = (ASSETS / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for licence, words in (
        ("LICENSE-Apache-2.0.txt", "Apache License"),
        ("LICENSE-MIT.txt", "Cal Henderson"),
        ("LICENSE-Unicode-3.0.txt", "UNICODE LICENSE V3"),
    ):
        assert words in (ASSETS / licence).read_text(encoding="utf-8")
        assert licence in attribution
    assert "Noto Emoji" in attribution


def test_assets_fit_the_promised_size() -> None:
    assert sum(file.stat().st_size for file in ASSETS.iterdir()) < 10e6


def test_data_needs_no_torch() -> None:
    code = "import sys, ditscale.dit.data; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
