"""The exact FLOP ledger of a DiT: closed forms in integers, no torch.

One FLOP is one addition or one multiplication, so a multiply-add is two. The convention here is ``matmul``: matrix
products only, the attention's two included, biases, norms, activations and look-ups left out. It is what
``torch.utils.flop_counter.FlopCounterMode`` counts on the meta device, and the tests hold the two equal to the last
integer. The backward pass is the true one: no gradient is taken with respect to the image and the time features.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ditscale.dit.config import DiTConfig
from ditscale.errors import InputError

CONVENTION = "matmul"


@dataclass(frozen=True)
class LedgerLine:
    """One line of the ledger, for the whole batch.

    Attributes:
        name: where in the model, such as ``blocks.attn.qkv``.
        operation: "matmul" or "attention".
        formula: the forward count in words, with the field's letters (B, T, D, F, L, P, C).
        forward: FLOPs of the forward pass.
        backward: FLOPs of the backward pass, gradients that nobody needs left out.
    """

    name: str
    operation: str
    formula: str
    forward: int
    backward: int


@dataclass(frozen=True)
class ParamCount:
    """Trainable parameters by how often they work; ``total`` is the sum of the other three.

    Attributes:
        total: all trainable parameters. The fixed sine-cosine position table is not one.
        per_token: used once for every token (patch embedding, attention, feed-forward, output).
        per_sample: used once for every image (time and condition layers, adaLN modulation).
        embedding: rows that are looked up (label or word table).
    """

    total: int
    per_token: int
    per_sample: int
    embedding: int


@dataclass(frozen=True)
class FlopReport:
    """What one forward pass, backward pass and training step of a batch cost.

    Attributes:
        model: the configuration's name, or "".
        image_size: pixels on a side.
        batch: images.
        tokens: tokens of one image.
        forward, backward, train: FLOPs of the batch; ``train`` is their sum (the optimizer is not in it).
        macs_forward: multiply-adds of the forward pass, the unit that the DiT paper calls Gflops.
        params: see :class:`ParamCount`.
        ledger: the lines that the three sums are made of.
        convention: what is counted; here always ``matmul``.
    """

    model: str
    image_size: int
    batch: int
    tokens: int
    forward: int
    backward: int
    train: int
    macs_forward: int
    params: ParamCount
    ledger: tuple[LedgerLine, ...]
    convention: str = CONVENTION

    def to_json(self) -> dict[str, Any]:
        """Plain values, under the names that the command line prints."""
        return {
            "model": self.model,
            "image_size": self.image_size,
            "batch": self.batch,
            "tokens": self.tokens,
            "convention": self.convention,
            "forward_flops": self.forward,
            "backward_flops": self.backward,
            "train_flops": self.train,
            "forward_macs": self.macs_forward,
            "params": dataclasses.asdict(self.params),
            "ledger": [dataclasses.asdict(line) for line in self.ledger],
        }


def count(config: DiTConfig, image_size: int | None = None, batch: int = 1) -> FlopReport:
    """Count the FLOPs and parameters of a DiT exactly.

    Args:
        config: the model.
        image_size: pixels on a side. Default: ``config.image_size``.
        batch: images in the batch, at least 1. Default: 1.

    Returns:
        FlopReport for the whole batch; parameters do not depend on the batch.

    Raises:
        InputError: ``image_size`` does not divide into patches, or ``batch`` is not a whole number of at least 1.
    """
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InputError(f"batch: expected a whole number of at least 1, got {batch!r}")
    size = config.image_size if image_size is None else image_size
    t = config.grid_side(size) ** 2
    d, f, depth = config.width, config.mlp_width, config.depth
    out_width = config.patch**2 * config.out_channels

    lines: list[LedgerLine] = []

    def linear(name: str, rows: int, fan_in: int, fan_out: int, formula: str, *, input_grad: bool = True) -> None:
        forward = 2 * rows * fan_in * fan_out
        lines.append(LedgerLine(name, "matmul", formula, forward, forward * (2 if input_grad else 1)))

    tokens = batch * t
    linear("patch_embed", tokens, config.patch_width, d, "2·B·T·P²C·D", input_grad=False)
    linear("time_mlp.0", batch, config.frequency_width, d, "2·B·frequencies·D", input_grad=False)
    linear("time_mlp.2", batch, d, d, "2·B·D²")
    if config.condition == "caption":
        linear("caption.proj", batch, config.caption_width, d, "2·B·caption_width·D")
    linear("blocks.modulation", depth * batch, d, 6 * d, "2·L·B·D·6D")
    linear("blocks.attn.qkv", depth * tokens, d, 3 * d, "2·L·B·T·D·3D")
    scores = 2 * depth * batch * t * t * d
    lines.append(LedgerLine("blocks.attn.scores", "attention", "2·L·B·T²·D", scores, 2 * scores))
    lines.append(LedgerLine("blocks.attn.values", "attention", "2·L·B·T²·D", scores, 2 * scores))
    linear("blocks.attn.proj", depth * tokens, d, d, "2·L·B·T·D²")
    linear("blocks.mlp.fc1", depth * tokens, d, f, "2·L·B·T·D·F")
    linear("blocks.mlp.fc2", depth * tokens, f, d, "2·L·B·T·F·D")
    linear("final.modulation", batch, d, 2 * d, "2·B·D·2D")
    linear("final.linear", tokens, d, out_width, "2·B·T·D·P²·C_out")

    forward = sum(line.forward for line in lines)
    backward = sum(line.backward for line in lines)
    return FlopReport(
        model=config.name,
        image_size=size,
        batch=batch,
        tokens=t,
        forward=forward,
        backward=backward,
        train=forward + backward,
        macs_forward=forward // 2,
        params=count_params(config),
        ledger=tuple(lines),
    )


def count_params(config: DiTConfig) -> ParamCount:
    """Trainable parameters, biases included, by how often they work."""
    d, f = config.width, config.mlp_width

    def linear(fan_in: int, fan_out: int) -> int:
        return fan_in * fan_out + fan_out

    block = linear(d, 3 * d) + linear(d, d) + linear(d, f) + linear(f, d)
    per_token = linear(config.patch_width, d) + config.depth * block
    per_token += linear(d, config.patch**2 * config.out_channels)
    per_sample = linear(config.frequency_width, d) + linear(d, d)
    per_sample += config.depth * linear(d, 6 * d) + linear(d, 2 * d)
    embedding = 0
    if config.condition == "class":
        embedding = (config.num_classes + 1) * d
    elif config.condition == "caption":
        embedding = config.vocabulary_size * config.caption_width
        per_sample += linear(config.caption_width, d)
    return ParamCount(per_token + per_sample + embedding, per_token, per_sample, embedding)
