"""What torch must know of the adaLN operators without running them: schemas, shapes of results, FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ditscale.kernels.adaln import cost


def _dense(t: Tensor) -> Tensor:
    return t.new_empty(t.shape)


def _stats(x: Tensor, save: bool) -> Tensor:
    shape = (2, x.shape[0], x.shape[1]) if save else (0,)
    return x.new_empty(shape, dtype=torch.float32)


def fake_layernorm_modulate_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, scale_base: float, rms: bool, save_stats: bool
) -> tuple[Tensor, Tensor]:
    """Shapes of ``layernorm_modulate_fwd``."""
    return _dense(x), _stats(x, save_stats)


def fake_layernorm_modulate_infer(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, scale_base: float, rms: bool
) -> Tensor:
    """Shape of ``layernorm_modulate_infer``."""
    return _dense(x)


def fake_layernorm_modulate_bwd(
    dy: Tensor, x: Tensor, scale: Tensor, stats: Tensor, eps: float, scale_base: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``layernorm_modulate_bwd``."""
    return _dense(x), _dense(scale), _dense(scale)


def fake_gate_residual_fwd(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """Shape of ``gate_residual_fwd``."""
    return _dense(x)


def fake_gate_residual_bwd(dout: Tensor, branch: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Shapes of ``gate_residual_bwd``."""
    return _dense(branch), _dense(gate)


def fake_gate_residual_layernorm_modulate_fwd(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    scale_base: float,
    rms: bool,
    save_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes of ``gate_residual_layernorm_modulate_fwd``."""
    return _dense(x), _dense(x), _stats(x, save_stats)


def fake_gate_residual_layernorm_modulate_bwd(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    branch: Tensor,
    gate: Tensor,
    scale: Tensor,
    stats: Tensor,
    eps: float,
    scale_base: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shapes of ``gate_residual_layernorm_modulate_bwd``."""
    return _dense(x_new), _dense(branch), _dense(gate), _dense(scale), _dense(scale)


FAKES = {
    "layernorm_modulate_fwd": fake_layernorm_modulate_fwd,
    "layernorm_modulate_infer": fake_layernorm_modulate_infer,
    "layernorm_modulate_bwd": fake_layernorm_modulate_bwd,
    "gate_residual_fwd": fake_gate_residual_fwd,
    "gate_residual_bwd": fake_gate_residual_bwd,
    "gate_residual_layernorm_modulate_fwd": fake_gate_residual_layernorm_modulate_fwd,
    "gate_residual_layernorm_modulate_bwd": fake_gate_residual_layernorm_modulate_bwd,
}
# As csrc/bindings/schemas.cpp declares them (a test compares); for operators that Python defines.
SCHEMAS = {
    "layernorm_modulate_fwd": "(Tensor x, Tensor shift, Tensor scale, float eps, float scale_base, bool rms, "
    "bool save_stats) -> (Tensor y, Tensor stats)",
    "layernorm_modulate_infer": "(Tensor x, Tensor shift, Tensor scale, float eps, float scale_base, bool rms) -> Tensor",
    "layernorm_modulate_bwd": "(Tensor dy, Tensor x, Tensor scale, Tensor stats, float eps, float scale_base, "
    "bool rms) -> (Tensor dx, Tensor dshift, Tensor dscale)",
    "gate_residual_fwd": "(Tensor x, Tensor branch, Tensor gate) -> Tensor",
    "gate_residual_bwd": "(Tensor dout, Tensor branch, Tensor gate) -> (Tensor dbranch, Tensor dgate)",
    "gate_residual_layernorm_modulate_fwd": "(Tensor x, Tensor branch, Tensor gate, Tensor shift, Tensor scale, "
    "float eps, float scale_base, bool rms, bool save_stats) -> (Tensor x_new, Tensor y, Tensor stats)",
    "gate_residual_layernorm_modulate_bwd": "(Tensor dy, Tensor? dx_new, Tensor x_new, Tensor branch, Tensor gate, "
    "Tensor scale, Tensor stats, float eps, float scale_base, bool rms) -> "
    "(Tensor dx, Tensor dbranch, Tensor dgate, Tensor dshift, Tensor dscale)",
}


def _flops(name: str) -> Callable[..., int]:
    op, _, way = name.rpartition("_")
    formula = getattr(cost, f"{op}_flops_{'backward' if way == 'bwd' else 'forward'}")
    return lambda first_shape, *_, **__: int(formula(*first_shape))  # the first argument is always [B, T, D]


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
