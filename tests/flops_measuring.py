"""Running a variant once on the meta device and counting it three ways at the same time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from flops_variants import Inputs, Variant

from ditscale.dit import DiTConfig
from ditscale.dit.attribution import EVERYTHING, ModuleAttribution
from ditscale.dit.flops import condition_tokens
from ditscale.dit.torch_costs import matmul_formulas
from ditscale.dit.tracing import Watch


FORMULAS = matmul_formulas()


@dataclass
class Measured:
    """FLOPs as (forward, backward): by torch's counter in total and by module, and of all operations by the table."""

    total: tuple[int, int] = (0, 0)
    modules: dict[str, tuple[int, int]] = field(default_factory=dict)
    everything: tuple[int, int] = (0, 0)
    by_operation: dict[str, tuple[int, int]] = field(default_factory=dict)
    params: int = 0


class QuickWatch(Watch):
    """Torch's own meta kernels of some operations are slow Python; an empty tensor of the right shape is all they give.

    It stands in for them after everything that counts has seen the operation.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        aten = torch.ops.aten
        self.table = {
            aten.add.Tensor: self.broadcast,
            aten.mul.Tensor: self.broadcast,
            aten.addmm.default: lambda bias, a, b: a.new_empty(a.shape[0], b.shape[1]),
            aten.gelu.default: lambda x, **_: x.new_empty(x.shape),
            aten.gelu_backward.default: lambda dy, x, **_: x.new_empty(x.shape),
            aten._softmax_backward_data.default: lambda dy, y, *_: y.new_empty(y.shape),
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
            return a.new_empty(a.shape)
        if a.dtype != b.dtype:
            return None
        return a.new_empty(a.shape if a.shape == b.shape else torch.broadcast_shapes(a.shape, b.shape))

    @staticmethod
    def layer_norm(x: Tensor, *_: object) -> tuple[Tensor, ...]:
        row = (*x.shape[:-1], 1)
        return x.new_empty(x.shape), x.new_empty(row), x.new_empty(row)

    @staticmethod
    def layer_norm_backward(
        dy: Tensor, x: Tensor, shape: object, mean: object, rstd: object, w: Tensor | None, b: Tensor | None, mask: list[bool]
    ) -> tuple[Tensor | None, ...]:
        return tuple(None if t is None or not m else t.new_empty(t.shape) for t, m in zip((x, w, b), mask, strict=True))

    @staticmethod
    def sum(x: Tensor, dims: list[int], keepdim: bool = False, **_: object) -> Tensor:
        gone = {d % x.dim() for d in dims} if x.dim() else set()
        shape = [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone]
        return x.new_empty(shape)


def inputs_of(config: DiTConfig, batch: int, lengths: list[int] | None, contexts: list[int] | None) -> Inputs:
    image = lengths or [config.tokens] * batch
    caption = contexts or [condition_tokens(config)] * len(image)
    frames = config.grid(config.image_size, config.image_width)[0]
    return Inputs(image, caption, lengths is not None or contexts is not None, frames)


def measure(
    config: DiTConfig, inputs: Inputs, *, flash: bool = False, custom: dict | None = None, quick: bool = True, **options: bool
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
        params=sum(p.numel() for p in model.parameters()),
    )


def flatten(counts: dict) -> dict[str, int]:
    """Sums by module, the numbers of blocks and experts struck out."""
    sums: dict[str, int] = {}
    for name, by_operation in counts.items():
        name = re.sub(r"\b(blocks|single)\.\d+", r"\1", name)
        name = re.sub(r"\.experts\.\d+", "", name)
        sums[name] = sums.get(name, 0) + sum(by_operation.values())
    return sums
