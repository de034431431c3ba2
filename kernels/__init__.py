"""Fused operators for diffusion transformers, each behind one function with several backends.

Every function takes ``backend="auto"``: the fastest implementation that has proved itself on this device, else plain
PyTorch. Importing this package imports no torch, so that the counting of FLOPs (``kernels.*.cost``) needs none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ditscale.kernels.adaln.op import gate_residual, gate_residual_layernorm_modulate, layernorm_modulate
    from ditscale.kernels.attn.op import attention, attention_qkv
    from ditscale.kernels.gelu.op import bias_gelu
    from ditscale.kernels.matmul.op import linear
    from ditscale.kernels.rotary.op import qk_norm_rope

_FAMILY = {  # the folder of each
    "attention": "attn",
    "attention_qkv": "attn",
    "bias_gelu": "gelu",
    "gate_residual": "adaln",
    "gate_residual_layernorm_modulate": "adaln",
    "layernorm_modulate": "adaln",
    "linear": "matmul",
    "qk_norm_rope": "rotary",
}
__all__ = [
    "attention",
    "attention_qkv",
    "bias_gelu",
    "gate_residual",
    "gate_residual_layernorm_modulate",
    "layernorm_modulate",
    "linear",
    "qk_norm_rope",
]


def __getattr__(name: str) -> Any:
    if name in _FAMILY:
        value = getattr(importlib.import_module(f"ditscale.kernels.{_FAMILY[name]}.op"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ditscale.kernels' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
