"""Running a variant once on the meta device and counting it three ways at the same time."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import zip_longest
from typing import Any

import model_variants
import torch
from flops_variants import Inputs, Variant
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ditscale.dit import DiTConfig
from ditscale.dit.attribution import EVERYTHING, ModuleAttribution
from ditscale.dit.flops import ParamCount, condition_tokens
from ditscale.dit.torch_costs import matmul_formulas
from ditscale.dit.tracing import Watch
from ditscale.dit.training.state import repeat_blocks

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
    """Stands before torch's counter and spares it what it would only pass on: products (whatever it has a formula for, or
    takes apart) go to it, the rest is run without it, by shape alone where torch's own meta kernels are slow Python.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_for_the_counter = functools.cache(
            lambda func: func not in SHAPES and (func._overloadpacket in flop_registry or func._can_decompose())
        )

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if self.is_for_the_counter(func):
            return func(*args, **kwargs)
        with torch._C._DisableTorchDispatch():
            return run_by_shape(func, args, kwargs)


class QuickProducts(TorchDispatchMode):
    """Runs by shape what torch's counter has counted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run_by_shape(func, args, kwargs or {})


def run_by_shape(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    quick = SHAPES.get(func) or PRODUCT_SHAPES.get(func)
    out = None if quick is None else quick(*args, **kwargs)
    return func(*args, **kwargs) if out is None else out


def empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device="meta")


def same(x: Tensor, *_: object, **__: object) -> Tensor:
    return empty(x, x.shape)


def second(_: Tensor, x: Tensor, *__: object, **___: object) -> Tensor:
    return empty(x, x.shape)


def broadcast(a: Tensor, b: Any) -> Tensor | None:
    if not isinstance(b, Tensor) or a.shape == b.shape:
        return empty(a, a.shape) if not isinstance(b, Tensor) or a.dtype == b.dtype else None
    if a.dtype != b.dtype:
        return None
    sides = zip_longest(reversed(a.shape), reversed(b.shape), fillvalue=1)
    return empty(a, [n if m == 1 else m for n, m in sides][::-1])


def reduced(x: Tensor, dims: list[int], keepdim: bool = False, **_: object) -> Tensor:
    gone = {d % x.dim() for d in dims} if x.dim() else set()
    return empty(x, [1 if i in gone else n for i, n in enumerate(x.shape) if keepdim or i not in gone])


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    return empty(parts[0], shape)


def normalised(x: Tensor, *_: object) -> tuple[Tensor, ...]:
    row = (*x.shape[:-1], 1)
    return empty(x, x.shape), empty(x, row), empty(x, row)


def normalised_backward(
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


aten = torch.ops.aten
SHAPES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.add.Tensor, aten.mul.Tensor), broadcast),
    **dict.fromkeys((aten.mul.Scalar, aten.div.Scalar, aten.pow.Tensor_Scalar), same),
    **dict.fromkeys((aten.rsqrt.default, aten.gelu.default, aten.silu.default), same),
    **dict.fromkeys(
        (aten.gelu_backward.default, aten.silu_backward.default, aten._softmax_backward_data.default), second
    ),
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim), reduced),
    aten.cat.default: joined,
    aten.native_layer_norm.default: normalised,
    aten.native_layer_norm_backward.default: normalised_backward,
}
PRODUCT_SHAPES: dict[Any, Callable[..., Any]] = {
    aten.addmm.default: lambda bias, a, b: empty(a, (a.shape[0], b.shape[1])),
    aten.mm.default: lambda a, b: empty(a, (a.shape[0], b.shape[1])),
    aten.bmm.default: lambda a, b: empty(a, (*a.shape[:2], b.shape[2])),
}


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
    with contextlib.ExitStack() as modes:
        for mode in (QuickProducts(), counter, watch) if quick else (watch, counter):
            modes.enter_context(mode)
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


@functools.cache
def hardware_of_repeated_blocks(name: str) -> int:
    """What a variant of our own model runs forward and backward, two samples, its blocks repeated as the trainer does it."""
    config, model = model_variants.config_of(name), model_variants.randomised(model_variants.config_of(name))
    repeat_blocks(model)
    with FlopCounterMode(display=False, custom_mapping=matmul_formulas(hardware=True)) as counter:
        model(*model_variants.inputs_of(config, 2)).square().sum().backward()
    return int(counter.get_total_flops())
