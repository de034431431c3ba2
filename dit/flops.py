"""The exact FLOP ledger of a DiT: closed forms in integers, no torch.

One FLOP is one addition or one multiplication, so a multiply-add is two. The default convention is
``matmul``: matrix products only, the attention's two included; biases, norms, activations and look-ups left
out. It is what ``torch.utils.flop_counter.FlopCounterMode`` counts on the meta device, and the tests hold the
two equal to the last integer, per module. The backward pass is the true one: no gradient is taken with
respect to the image, the time features and a frozen text encoder's output. Every formula is derived in
``docs/flops.md``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ditscale.dit.checks import is_whole, need_whole
from ditscale.dit.config import DiTConfig
from ditscale.dit.conventions import CONVENTIONS, COUNTED, Comparison, compare, published, resolve
from ditscale.dit.counting import Walk
from ditscale.dit.ledger import FlopReport, LedgerLine, ParamCount
from ditscale.dit.parts import Workload
from ditscale.errors import InputError

if TYPE_CHECKING:
    from ditscale.dit.encoders import AutoencoderSpec, TextEncoderSpec
    from ditscale.dit.extras import count_sampling as count_sampling
    from ditscale.dit.meter import FlopMeter as FlopMeter
    from ditscale.dit.tracing import TraceReport as TraceReport
    from ditscale.dit.tracing import trace as trace

__all__ = [
    "CONVENTION",
    "CONVENTIONS",
    "Comparison",
    "FlopMeter",
    "FlopReport",
    "LedgerLine",
    "ParamCount",
    "TraceReport",
    "compare",
    "count",
    "count_params",
    "count_sampling",
    "trace",
]

# Imported when first used: the tracer needs torch, which counting does not.
_HOMES = {
    "FlopMeter": "ditscale.dit.meter",
    "TraceReport": "ditscale.dit.tracing",
    "count_sampling": "ditscale.dit.extras",
    "trace": "ditscale.dit.tracing",
}

CONVENTION = "matmul"


def count(
    config: DiTConfig,
    image_size: int | tuple[int, int] | None = None,
    batch: int = 1,
    *,
    frames: int | None = None,
    lengths: Sequence[int] | None = None,
    context_lengths: Sequence[int] | None = None,
    convention: str = CONVENTION,
    recompute: str | Sequence[str] = "none",
    fused: bool = True,
    dtype_bytes: int = 2,
    optimizer: str | None = None,
    ema: bool = False,
    clip: bool = False,
    autoencoder: str | AutoencoderSpec | None = None,
    text_encoders: Sequence[str | TextEncoderSpec] = (),
    text_tokens: int | None = None,
) -> FlopReport:
    """Count the FLOPs and parameters of a DiT exactly.

    Args:
        config: the model.
        image_size: pixels on a side, or (height, width). Default: the configuration's.
        batch: samples in the batch, at least 1. Default: 1.
        frames: of the model's input. Default: the configuration's.
        lengths: image tokens of each sample of a packed batch, instead of ``image_size`` and ``batch``: no
            padding, and attention within each sample only. Default: None.
        context_lengths: caption tokens of each sample. Default: ``config.caption_tokens`` for all.
        convention: what counts; see ``ditscale.dit.conventions.CONVENTIONS``. Default: "matmul".
        recompute: forward work that is done again for the backward pass: "none", "block" (torch's checkpoint
            around each block of a plain model), "fused-block" (around those of ``ditscale.dit.DiT``, which leave
            their last branch to the next one: its product is not repeated; not under ``all``), "attention" (the
            two products and the softmax), or names of lines. Default: "none".
        fused: under ``all``, count the operators of ``ditscale.kernels`` as they compute; False counts the
            plain operations that they replace, as autograd runs them. Default: True.
        dtype_bytes: of an element, for the bytes moved. Default: 2.
        optimizer: "adamw", "adam", "sgd" or "momentum" as a line beside the model. Default: None.
        ema, clip: averaging the weights and clipping the gradient as lines beside the model. Default: False.
        autoencoder: that encodes every image on the fly, as a line: "sd", "sd3" or a specification. Default:
            None.
        text_encoders: that encode every caption on the fly, as lines: names such as "t5-xxl". Default: ().
        text_tokens: tokens of a caption for them. Default: ``config.caption_tokens``.

    Returns:
        FlopReport for the whole batch; parameters do not depend on the batch.

    Raises:
        InputError: an argument is not possible; names it, what was expected and what came.
    """
    need_whole("batch", batch, 1)
    if image_size is None:
        height, width = config.image_size, config.image_width
    elif isinstance(image_size, tuple):
        height, width = image_size
    else:
        height, width = image_size, None
    grid = config.grid(height, width, frames)
    tokens = grid[0] * grid[1] * grid[2]
    context = condition_tokens(config)
    if lengths is None and context_lengths is None:
        work = Workload(((batch, tokens, context),), grid[0])
    else:
        work = _packed(config, batch, tokens, context, grid[0], lengths, context_lengths)
        batch = work.batch
    counted = convention
    if convention not in COUNTED:
        convention, counted = resolve(convention), "matmul"
    walk = Walk(config, work, elementwise=counted == "all", fused=fused, size=dtype_bytes)
    ledger = walk.lines(recompute, hardware=counted == "hardware")
    forward = backward = again = products = 0
    for line in ledger:
        forward += line.forward
        backward += line.backward
        again += line.recompute
        if line.operation == "matmul" or line.name.endswith((".scores", ".values")):
            products += line.forward
    report = FlopReport(
        model=config.name,
        image_size=height,
        batch=batch,
        tokens=tokens if lengths is None else sum(lengths),
        forward=forward,
        backward=backward,
        train=forward + backward + (again if counted == "hardware" else 0),
        macs_forward=products // 2,
        params=walk.params,
        ledger=ledger,
        convention=counted,
        recompute=again,
        image_width=width,
        frames=config.frames if frames is None else frames,
        context_tokens=context if context_lengths is None else sum(context_lengths),
    )
    if optimizer is not None or ema or clip or autoencoder is not None or text_encoders:
        from ditscale.dit.extras import encoder_lines, optimizer_lines

        extras = optimizer_lines(walk.params.trainable, optimizer, ema=ema, clip=clip) + encoder_lines(
            config,
            batch,
            height,
            height if width is None else width,
            encode=autoencoder,
            text_encoders=text_encoders,
            text_tokens=text_tokens,
        )
        report = dataclasses.replace(report, extras=extras)
    if convention in COUNTED:
        return report
    return published(
        convention,
        config,
        report,
        image_tokens=sum(n * t for n, t, _ in work.groups),
        context_tokens=sum(n * s for n, _, s in work.groups),
        norm_elements=walk.norm_elements,
    )


def count_params(config: DiTConfig) -> ParamCount:
    """Trainable parameters, biases included, by how often they work."""
    frames = config.grid(config.image_size, config.image_width)[0]
    work = Workload(((1, config.tokens, condition_tokens(config)),), frames)
    return Walk(config, work, elementwise=False, fused=True, size=2).params


def condition_tokens(config: DiTConfig) -> int:
    """Tokens of a sample's condition that the blocks see, without the time's."""
    if config.context == "pooled" or config.condition == "none":
        return 0
    return 1 if config.condition == "class" else config.caption_tokens


def _packed(
    config: DiTConfig,
    batch: int,
    tokens: int,
    context: int,
    frames: int,
    lengths: Sequence[int] | None,
    context_lengths: Sequence[int] | None,
) -> Workload:
    """Samples of different lengths, counted together where they are alike."""
    for name, given in (("lengths", lengths), ("context_lengths", context_lengths)):
        bad = [n for n in given or () if not is_whole(n, 1)]
        if bad or (given is not None and not given):
            raise InputError(f"{name}: expected whole numbers of at least 1, got {bad[0] if bad else 'none'!r}")
    if lengths is not None and config.attention != "full":
        raise InputError(f"lengths: expected none where attention is {config.attention}, got some")
    if context_lengths is not None and (config.condition != "caption" or config.context == "pooled"):
        raise InputError("context_lengths: expected none for a model that takes no caption tokens, got some")
    if lengths is None:
        lengths = [tokens] * (batch if context_lengths is None or batch > 1 else len(context_lengths))
    if context_lengths is None:
        context_lengths = [context] * len(lengths)
    if len(lengths) != len(context_lengths) or batch not in (1, len(lengths)):
        raise InputError(
            f"lengths, context_lengths, batch: expected one number of samples, "
            f"got {len(lengths)}, {len(context_lengths)} and {batch}"
        )
    alike = Counter(zip(lengths, context_lengths, strict=True))
    return Workload(tuple((n, t, s) for (t, s), n in alike.items()), frames, packed=True)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ditscale.dit.flops' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
