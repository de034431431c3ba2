"""Pictures: tensors to bytes, and to PNG grids for people."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ditscale.dit.files import write_atomically
from ditscale.errors import InputError


def to_bytes(images: Tensor) -> Tensor:
    """[-1, 1] to uint8, rounded and clipped, as a picture is stored."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def save_grid(path: str | Path, images: Tensor, *, columns: int | None = None, gap: int = 2) -> None:
    """Write images side by side as one PNG, on a transparent ground.

    Args:
        path: the file.
        images: [n, 3, H, W] float, -1 black to 1 white; values outside are clipped. Videos, [n, 3, F, H, W], are a row of
            frames each.
        columns: images in a row. Default: about as many columns as rows.
        gap: pixels between. Default: 2.

    Raises:
        InputError: another shape, values that are not finite, or a place that cannot be written.
    """
    if images.ndim == 5:
        columns = images.shape[2]
        images = images.transpose(1, 2).flatten(0, 1)
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise InputError(f"images: expected shape [n, 3, H, W] with n >= 1, got {list(images.shape)}")
    if not bool(images.isfinite().all()):
        raise InputError("images: expected finite values, got NaN or infinity (did the model diverge?)")
    count, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    pixels = to_bytes(images.float()).permute(0, 2, 3, 1).cpu().numpy()
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for i, picture in enumerate(pixels):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width, :3] = picture
        sheet[top : top + height, left : left + width, 3] = 255
    buffer = io.BytesIO()
    Image.fromarray(sheet, "RGBA").save(buffer, "PNG", optimize=True)
    write_atomically(Path(path), buffer.getvalue())
