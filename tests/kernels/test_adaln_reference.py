"""The reference, the oracle of the kernels, by finite differences in float64: first and second derivatives, both modes."""

from __future__ import annotations

import inspect

import pytest
import torch
from cases import block

from ditscale import kernels
from ditscale.kernels.adaln import reference as adaln_reference
from ditscale.kernels.gelu import reference as gelu_reference


def draw(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]


def test_a_block_twice():
    leaves = draw((1, 2, 3), (1, 2, 3), (1, 9), (3,))

    def f(*a):
        return block(*a, "reference")

    assert torch.autograd.gradcheck(f, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, leaves)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("lead", [(), (2,), (2, 1), (2, 2)], ids=["shared", "per_sample", "kept-dim", "per_token"])
def test_affine_norm_of_every_kind_of_modulation(lead, norm):
    x, shift, scale, w, b = draw((2, 2, 3), (*lead, 3), (*lead, 3), (3,), (3,))

    def f(*a):
        return kernels.layernorm_modulate(a[0], a[1], a[2], weight=a[3], bias=a[4], norm=norm, backend="reference")

    assert torch.autograd.gradcheck(f, (x, shift, scale, w, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, shift, scale, w, b))


def test_gelu():
    x, b = draw((3, 4), (4,))
    assert torch.autograd.gradcheck(kernels.bias_gelu, (x, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(kernels.bias_gelu, (x, b))


def test_it_is_plain_torch():
    # The oracle must not lean on what it judges.
    for module in (adaln_reference, gelu_reference):
        source = inspect.getsource(module)
        source = source.replace("torch.native_layer_norm", "").replace("torch.ops.aten", "")  # PyTorch's own
        assert "native" not in source.replace("native_layer_norm_backward", "")
        assert "torch.ops" not in source and "triton" not in source
