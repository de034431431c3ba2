"""Bias and tanh GELU in plain PyTorch: the oracle, and what runs where no kernel does."""

from __future__ import annotations

import torch
from torch import Tensor


def bias_gelu_ref(x: Tensor, bias: Tensor) -> Tensor:
    """``gelu(x + bias)``, tanh form; x [..., F], bias [F]; float32 inside (float64 for float64), one rounding."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = x.to(wide) + bias.to(wide)
    # Beyond 20 the function is z or 0 to the last bit of float64, and what torch differentiates far out is 0 times infinity.
    # (relu, unlike clamp_min, lets no gradient through at 0, where it would only round the true one.)
    inner = z.clamp(-20.0, 20.0)
    y = torch.nn.functional.gelu(inner, approximate="tanh") + torch.relu(z - inner)
    # The gradient of a NaN is one, too. Contiguous as the kernels' results: of permuted rows PyTorch makes permuted ones.
    return torch.where(z == z, y, z * z).to(x.dtype).contiguous()
