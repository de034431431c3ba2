"""Running a variant once on the meta device and counting it three ways at the same time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from flops_variants import Inputs, Variant
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ditscale.dit import DiTConfig
from ditscale.dit.attribution import EVERYTHING, ModuleAttribution
from ditscale.dit.flops import ParamCount, condition_tokens
from ditscale.dit.torch_costs import matmul_formulas
from ditscale.dit.tracing import Watch

FORMULAS = matmul_formulas()


@dataclass
class Measured:
    """FLOPs as (forward, backward): by torch's counter in total and by module, and of all operations by the
    table.
    """

    total: tuple[int, int] = (0, 0)
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    everything: tuple[int, int] = (0, 0)
    by_operation: dict[str, tuple[int, int]] = field(default_factory=dict)
    params: ParamCount | None = None


class QuickWatch(Watch):
    """Torch's own meta kernels of some operations are slow Python; an empty tensor of the right shape is all
    they give.

    It stands in for them after everything that counts has seen the operation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        aten = torch.ops.aten
        self.table = {
            aten.add.Tensor: self.broadcast,
            aten.mul.Tensor: self.broadcast,
            aten.addmm.default: lambda bias, a, b: empty(a, (a.shape[0], b.shape[1])),
            aten.gelu.default: lambda x, **_: empty(x, x.shape),
            aten.gelu_backward.default: lambda dy, x, **_: empty(x, x.shape),
            aten._softmax_backward_data.default: lambda dy, y, *_: empty(y, y.shape),
            aten.native_layer_norm.default: self.layer_norm,
            aten.native_layer_norm_backward.default: self.layer_norm_backward,
            aten.sum.dim_IntList: self.sum,
        }

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        quick = self.table.get(func)
        out = None if quick is None else quick(*args, **kwargs)
        return func(*args, **kwargs) if out is None else out

    @staticmethod
    def broadcast(a: Tensor, b: Any) -> Tensor | None:
        if not isinstance(b, Tensor):
            return empty(a, a.shape)
        if a.dtype != b.dtype:
            return None
        return empty(a, a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape))

    @staticmethod
    def layer_norm(x: Tensor, *_: object) -> tuple[Tensor, ...]:
        row = (*x.shape[:-1], 1)
        return empty(x, x.shape), empty(x, row), empty(x, row)

    @staticmethod
    def layer_norm_backward(
        dy: Tensor,
        x: Tensor,
        shape: object,
        mean: object,
        rstd: object,
        w: Tensor | None,
        b: Tensor | None,
        mask: list[bool],
    ) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None or not m else empty(t, t.shape) for t, m in zip((x, w, b), mask, strict=True))

    @staticmethod
    def sum(x: Tensor, dims: list[int], keepdim: bool = False, **_: object) -> Tensor:
        gone = {d % x.dim() for d in dims} if x.dim() else set()
        shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
        return empty(x, shape)


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def inputs_of(config: DiTConfig, batch: int, lengths: list[int] | None, contexts: list[int] | None) -> Inputs:
    image = lengths or [config.tokens] * batch
    caption = contexts or [condition_tokens(config)] * len(image)
    frames = config.grid(config.image_size, config.image_width)[0]
    return Inputs(image, caption, lengths is not None or contexts is not None, frames)


def measure(
    config: DiTConfig,
    inputs: Inputs,
    *,
    flash: bool = False,
    custom: dict | None = None,
    quick: bool = True,
    **options: bool,
) -> Measured:
    model = Variant(config, **options)
    if flash:
        for module in model.modules():
            if hasattr(module, "flash"):
                module.flash = True
    attribution = ModuleAttribution(model)
    counter = FlopCounterMode(display=False, custom_mapping=custom)
    counter.mod_tracker = attribution
    watch = (QuickWatch if quick else Watch)(attribution, FORMULAS, everything=True)
    with watch, counter:
        out = model(inputs)
        forward, all_forward = flatten(counter.get_flop_counts()), dict(watch.flops[EVERYTHING])
        out.backward(torch.empty_like(out))
    both, all_both = flatten(counter.get_flop_counts()), dict(watch.flops[EVERYTHING])
    assert not watch.uncounted, watch.uncounted
    return Measured(
        total=(forward[EVERYTHING], both[EVERYTHING] - forward[EVERYTHING]),
        modules={n: (forward.get(n, 0), flops - forward.get(n, 0)) for n, flops in both.items()},
        everything=(sum(all_forward.values()), sum(all_both.values()) - sum(all_forward.values())),
        by_operation={op: (all_forward.get(op, 0), n - all_forward.get(op, 0)) for op, n in all_both.items()},
        params=parameters(model),
    )


def flatten(counts: dict) -> dict[str, int]:
    """Sums by module, the numbers of blocks and experts struck out."""
    sums: dict[str, int] = {}
    for name, by_operation in counts.items():
        name = re.sub(r"\b(blocks|single)\.\d+", r"\1", name)
        name = re.sub(r"\.experts\.\d+", "", name)
        sums[name] = sums.get(name, 0) + sum(by_operation.values())
    return sums


def parameters(model: Variant) -> ParamCount:
    """Parameters by how often they work, told from where they stand."""
    config = model.config
    by = {"token": 0, "context": 0, "sample": 0, "embedding": 0}
    idle = body = Fraction(0)
    for name, parameter in model.named_parameters():
        who = kind_of(name, config)
        by[who] += parameter.numel()
        working = Fraction(1)
        if ".experts." in name:
            working = Fraction(config.experts_per_token, config.experts)
            idle += (1 - working) * parameter.numel()
        product = parameter.dim() == 2 and not name.endswith(("norm.weight", "table"))
        if who == "token" and product and name.startswith(("blocks.", "single.")):
            body += working * parameter.numel()
    total = sum(by.values())
    active, body = total - idle, body
    assert active.denominator == body.denominator == 1
    return ParamCount(
        total, by["token"], by["sample"], by["embedding"], by["context"], active.numerator, body.numerator
    )


def kind_of(name: str, config: DiTConfig) -> str:
    parts = name.split(".")
    if name in ("label", "positions", "caption.words"):
        return "embedding"
    if parts[0] == "caption":
        return "sample" if config.context == "pooled" else "context"
    if parts[0] in ("time_mlp", "guidance", "pooled") or "modulation" in parts or parts[-1] == "table":
        return "sample"
    if "context" in parts or (parts[-3:-1] == ["cross", "kv"]) or ("cross" in parts and "k_norm" in parts):
        return "context"
    return "token"
