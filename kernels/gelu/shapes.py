"""What torch must know of ``bias_gelu`` without running it: schemas, shapes of results, FLOPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ditscale.kernels.gelu import cost

# As csrc/bindings/schemas.cpp declares them (a test compares); for operators that Python defines.
SCHEMAS = {
    "bias_gelu_fwd": "(Tensor x, Tensor bias) -> Tensor",
    "bias_gelu_bwd": "(Tensor dy, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
}


def fake_bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """Shape of ``bias_gelu_fwd``."""
    return x.new_empty(x.shape)


def fake_bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of ``bias_gelu_bwd``."""
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


FAKES: dict[str, Callable[..., Any]] = {
    "bias_gelu_fwd": fake_bias_gelu_fwd,
    "bias_gelu_bwd": fake_bias_gelu_bwd,
}


def _flops(name: str) -> Callable[..., int]:
    formula = cost.bias_gelu_flops_backward if name.endswith("bwd") else cost.bias_gelu_flops_forward
    return lambda shape, *_, **__: formula(math.prod(shape[:-1]), shape[-1])


def describe(namespace: str) -> None:
    """Tell torch the shapes and FLOPs of the operators of a namespace."""
    for name, fake in FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
        register_flop_formula(getattr(getattr(torch.ops, namespace), name))(_flops(name))


_libraries: list[torch.library.Library] = []  # an operator lives as long as the library object that defined it


def define(namespace: str, implementations: dict[str, Callable[..., Any]], key: str) -> None:
    """Define the operators in Python, implemented for one dispatch key, and describe them."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, implementation in implementations.items():
        library.define(name + SCHEMAS[name])
        library.impl(name, implementation, key)
    _libraries.append(library)
    describe(namespace)
