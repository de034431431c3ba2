"""Ledger lines beside the model: optimizer, averaged weights, encoders; and the cost of drawing samples. No
torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ditscale.dit.checks import need_choice, need_whole
from ditscale.dit.config import DiTConfig
from ditscale.dit.encoders import AUTOENCODERS, TEXT_ENCODERS, AutoencoderSpec, TextEncoderSpec, find_spec
from ditscale.dit.ledger import FlopReport, LedgerLine
from ditscale.errors import InputError

# Operations on one parameter, as torch.optim and torch._foreach_lerp_ do them: decay 1, first moment 3,
# second moment 4, root and scale and epsilon 3, update 3. Numbers of four bytes that are read and written.
OPTIMIZERS = {"adamw": (14, 7), "adam": (13, 7), "sgd": (2, 3), "momentum": (4, 5)}
AVERAGE_FLOPS, AVERAGE_NUMBERS = 3, 3
CLIP_FLOPS, CLIP_NUMBERS = 3, 3  # square and sum, then scale


def optimizer_lines(
    params: int, optimizer: str | None, *, ema: bool = False, clip: bool = False
) -> tuple[LedgerLine, ...]:
    """What happens to the weights once a step, whatever the batch.

    Args:
        params: trainable parameters.
        optimizer: "adamw", "adam" (no weight decay), "sgd", "momentum" or None.
        ema: the weights are averaged. Default: False.
        clip: the gradient's norm is clipped. Default: False.
    """
    lines = []
    if optimizer is not None:
        need_choice("optimizer", optimizer, tuple(OPTIMIZERS))
        each, numbers = OPTIMIZERS[optimizer]
        moved = 4 * numbers * params
        lines.append(
            LedgerLine(f"optimizer.{optimizer}", "optimizer", f"{each}·parameters", each * params, 0, 0, moved)
        )
    if clip:
        moved = 4 * CLIP_NUMBERS * params
        lines.append(LedgerLine("optimizer.clip", "optimizer", "3·parameters", CLIP_FLOPS * params, 0, 0, moved))
    if ema:
        moved = 4 * AVERAGE_NUMBERS * params
        lines.append(LedgerLine("optimizer.ema", "optimizer", "3·parameters", AVERAGE_FLOPS * params, 0, 0, moved))
    return tuple(lines)


def encoder_lines(
    config: DiTConfig,
    samples: int,
    height: int,
    width: int,
    *,
    encode: str | AutoencoderSpec | None = None,
    decode: str | AutoencoderSpec | None = None,
    text_encoders: Sequence[str | TextEncoderSpec] = (),
    text_tokens: int | None = None,
) -> tuple[LedgerLine, ...]:
    """Autoencoder and text encoders for ``samples`` images (every frame of a video by itself) and their
    captions.
    """
    lines = []
    images = samples * config.frames
    if encode is not None:
        flops = find_spec("autoencoder", encode, AUTOENCODERS).encode(height, width)
        lines.append(LedgerLine("autoencoder.encode", "matmul", "an image each", images * flops, 0))
    if decode is not None:
        flops = find_spec("autoencoder", decode, AUTOENCODERS).decode(height, width)
        lines.append(LedgerLine("autoencoder.decode", "matmul", "an image each", images * flops, 0))
    tokens = config.caption_tokens if text_tokens is None else text_tokens
    for i, name in enumerate(text_encoders):
        flops = find_spec("text_encoders", name, TEXT_ENCODERS).encode(tokens)
        label = name if isinstance(name, str) else str(i)
        lines.append(LedgerLine(f"text_encoder.{label}", "matmul", "a caption each", samples * flops, 0))
    return tuple(lines)


def evaluations(steps: int, sampler: str) -> int:
    """How often a sampler runs the model: "euler" once a step, "heun" twice but once in the last."""
    need_whole("steps", steps, 1)
    if sampler not in ("euler", "heun"):
        raise InputError(f"sampler: expected euler or heun, got {sampler!r}")
    return steps if sampler == "euler" else 2 * steps - 1


def count_sampling(
    config: DiTConfig,
    image_size: int | tuple[int, int] | None = None,
    images: int = 1,
    *,
    steps: int,
    sampler: str = "euler",
    guidance: bool = True,
    guided_share: float = 1.0,
    autoencoder: str | AutoencoderSpec | None = None,
    text_encoders: Sequence[str | TextEncoderSpec] = (),
    text_tokens: int | None = None,
    convention: str = "matmul",
) -> FlopReport:
    """Count what drawing samples costs; there is no backward pass.

    Args:
        config: the model. Its masking or routing (``token_keep``) is for training and left out.
        image_size: as in ``ditscale.dit.flops.count``.
        images: samples to draw. Default: 1.
        steps: of the sampler.
        sampler: "euler" or "heun". Any sampler of one evaluation a step counts as "euler". Default: "euler".
        guidance: classifier-free guidance, which runs the model with and without the condition. Default:
            True.
        guided_share: of the evaluations that are guided (a guidance interval), rounded to whole ones.
            Default: 1.0.
        autoencoder: decodes the latents. Default: None.
        text_encoders: encode the captions, and an empty one for guidance. Default: ().
        text_tokens: of a caption. Default: ``config.caption_tokens``.
        convention: as in ``count``; one that is counted. Default: "matmul".

    Returns:
        FlopReport of all images; ``step`` has the encoders in it, ``forward`` has not.

    Raises:
        InputError: an argument is not possible.
    """
    from ditscale.dit.flops import count

    if not 0 <= guided_share <= 1:
        raise InputError(f"guided_share: expected 0 to 1, got {guided_share!r}")
    runs = evaluations(steps, sampler)
    if guidance:
        runs += round(guided_share * runs)
    once = count(config.replace(token_keep=()), image_size, images, convention=convention)
    ledger = tuple(
        line._replace(
            formula=f"{runs} x {line.formula}",
            forward=runs * line.forward,
            backward=0,
            recompute=0,
            bytes_forward=runs * line.bytes_forward,
            bytes_backward=0,
        )
        for line in once.ledger
    )
    width = once.image_size if once.image_width is None else once.image_width
    extras = encoder_lines(
        config,
        images,
        once.image_size,
        width,
        decode=autoencoder,
        text_encoders=text_encoders,
        text_tokens=text_tokens,
    )
    return dataclasses.replace(
        once,
        forward=runs * once.forward,
        backward=0,
        recompute=0,
        train=runs * once.forward,
        macs_forward=runs * once.macs_forward,
        ledger=ledger,
        extras=extras,
    )
