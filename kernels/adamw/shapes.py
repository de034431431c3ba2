"""What torch must know of ``adamw_average_`` without running it: its schema and FLOPs."""

from __future__ import annotations

import math

from torch import Tensor

from ditscale.kernels.adamw import cost
from ditscale.kernels.register import Operator


def fake_adamw_average(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    average: Tensor | None,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    clip: float,
    decay: float,
) -> None:
    """It writes in place."""


OPERATORS = {
    "adamw_average_": Operator(
        "(Tensor(a!) weight, Tensor gradient, Tensor(b!) first, Tensor(c!) second, Tensor(d!)? average, int step, "
        "float lr, float beta1, float beta2, float eps, float weight_decay, float clip, float decay) -> ()",
        fake_adamw_average,
        lambda weight, gradient, first, second, average, *_, **__: cost.adamw_flops(
            math.prod(weight), average=average is not None
        ),
    )
}
