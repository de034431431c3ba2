"""What a run looks at on the way and at its end: the validation loss by time, and pictures."""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ditscale.dit.condition import each
from ditscale.dit.flow import ValidationSet
from ditscale.dit.pictures import save_grid
from ditscale.dit.rundata import RunData
from ditscale.dit.sampling import default_clip, default_steps, draw_samples
from ditscale.dit.seeds import seed_for
from ditscale.dit.training.batches import StepInputs
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.state import TrainState

_PICTURES = 16
_PICTURE_STEPS = 20
_GUIDANCE = 2.0


@torch.no_grad()
def validation_losses(config: TrainConfig, state: TrainState, validation: ValidationSet) -> list[float]:
    """The averaged weights' mean loss at every time, in float32; each rank takes a share of the images."""
    ranks, model, flow = state.ranks, state.model, config.flow
    totals = [0.0] * len(validation.times)
    model.eval()
    with state.updater.averaged():
        for i, x_0, y, eps, t in validation.batches():
            count = len(t)
            # Every rank makes the same number of calls, as sharded weights need it; rows past the end count nothing.
            share = -(-count // ranks.count)
            place = ranks.rank * share
            rows = torch.arange(place, place + share).clamp(max=count - 1)
            mine = StepInputs(x_0, y, eps, t, None).changed(operator.itemgetter(rows))
            mine = mine.changed(lambda tensor: tensor.to(ranks.device))
            losses = flow.loss(model, *mine).double()
            totals[i] += float(losses[: max(0, min(share, count - place))].sum())
    model.train()
    return [total / len(validation.images) for total in ranks.sum(totals)]


def picture_settings(config: TrainConfig) -> tuple[int, float]:
    """Steps and guidance of pictures that show how a run does: of a short chain all its steps, and no guidance by a model that
    has never gone without its condition, or that training told a guidance of 1."""
    steps = min(_PICTURE_STEPS, default_steps(config.flow))
    model = config.model
    guided = model.condition != "none" and config.condition_dropout > 0 and not model.guidance_embed
    return steps, _GUIDANCE if guided else 1.0


def draw_pictures(
    config: TrainConfig,
    state: TrainState,
    validation: ValidationSet,
    path: Path,
    data: RunData,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Write one PNG of samples of the averaged weights: always the same noise and conditions of the validation set.

    ``data`` tells the scale of pixels; ``decode`` makes pictures of a model's latents.
    """
    device = state.ranks.device
    count = min(_PICTURES, len(validation.images))
    generator = torch.Generator().manual_seed(seed_for(config.evaluation_seed, "pictures"))
    noise = torch.randn((count, *validation.images.shape[1:]), generator=generator).to(device)
    y = each(validation.conditions, lambda tensor: tensor[:count].to(device))
    steps, guidance = picture_settings(config)
    with state.updater.averaged():
        images = draw_samples(
            state.model,
            noise,
            y,
            objective=config.flow,
            steps=steps,
            sampler="euler",
            guidance=guidance,
            clip=default_clip(config.flow, config.model, data),
        )
    if state.ranks.first:
        save_grid(path, images if decode is None else decode(images))
