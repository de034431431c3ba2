"""``product``, the operator of linear layers, as torch must know it: ``ditscale::product``, ``ditscale_onednn::product``."""

from __future__ import annotations

from torch import Tensor

from ditscale.kernels.matmul import cost
from ditscale.kernels.register import Operator

# With fewer multiply-adds than this a layer and its gradients cost less by MKL, which PyTorch calls with less ado,
SMALLEST = 6 << 20
# unless its weight has so many numbers: up to 48 rows take no longer than to read it (as in csrc/cpu/product.cpp).
LARGE_WEIGHT = 1 << 17


def fake_product(x: Tensor, weight: Tensor, bias: Tensor | None, always: bool) -> Tensor:
    """Shape of ``product``."""
    return x.new_empty((x.shape[0], weight.shape[0]))


OPERATORS = {
    "product": Operator(
        "(Tensor x, Tensor weight, Tensor? bias, bool always) -> Tensor",
        fake_product,
        lambda x, weight, *_, **__: cost.linear_flops_forward(x[0], x[1], weight[0]),
    )
}
