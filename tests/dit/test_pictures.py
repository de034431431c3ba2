"""Pictures: what stands where in a grid, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ditscale.dit.pictures import save_grid
from ditscale.errors import InputError


def pixels(path):
    with Image.open(path) as sheet:
        return np.asarray(sheet)


def test_images_stand_in_rows_on_a_transparent_ground(tmp_path):
    images = torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 4, 6).clone()
    images[2, 0] = 7.0  # clipped
    save_grid(tmp_path / "x.png", images, columns=2, gap=1)
    sheet = pixels(tmp_path / "x.png")
    assert sheet.shape == (9, 13, 4)
    assert (sheet[:4, :6, :3] == 0).all() and (sheet[:4, 7:, :3] == 128).all() and (sheet[5:, :6, :3] == 255).all()
    assert not sheet[4, :, 3].any() and not sheet[5:, 6:, 3].any() and (sheet[:4, :6, 3] == 255).all()


def test_videos_are_a_row_of_frames_each(tmp_path):
    videos = torch.rand(2, 3, 5, 4, 4) * 2 - 1
    save_grid(tmp_path / "video.png", videos, gap=0)
    frames = videos.transpose(1, 2).flatten(0, 1)
    save_grid(tmp_path / "frames.png", frames, columns=5, gap=0)
    assert pixels(tmp_path / "video.png").shape == (8, 20, 4)
    assert (pixels(tmp_path / "video.png") == pixels(tmp_path / "frames.png")).all()


@pytest.mark.parametrize(
    ("images", "named"),
    [
        (torch.zeros(2, 4, 4, 4), r"\[n, 3, H, W\]"),
        (torch.zeros(0, 3, 4, 4), "n >= 1"),
        (torch.full((1, 3, 2, 2), float("nan")), "finite"),
    ],
)
def test_what_is_no_picture_is_refused(tmp_path, images, named):
    with pytest.raises(InputError, match=named):
        save_grid(tmp_path / "x.png", images)
