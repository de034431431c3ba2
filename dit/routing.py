"""Which of the image's tokens a block works on in training, where a configuration keeps a share of them.

The others pass it by. The choice is a function of a noisy sample and its time, so it is the same in any batch, on any number of
processes and after any resume, and needs no state. The time alone would not do: a chain of T steps has T times, and so T
choices. (Routing past blocks: Krause et al., arXiv:2501.04765; masking: arXiv:2407.15811.)
"""

from __future__ import annotations

import torch
from torch import Tensor

_M1, _M2 = 0x2545F4914F6CDD1D, 0x1B873593CC9E2D51  # odd, below 2^63


def kept_tokens(t_B: Tensor, x: Tensor, tokens: int, count: int, salt: int) -> Tensor:
    """Numbers of ``count`` of the ``tokens`` of each sample, rising: [B, count] int64.

    Args:
        t_B: times [B].
        x: noisy samples [B, ...]; their first numbers are read. Equal ones give equal choices at equal times.
        tokens: T.
        count: how many stay.
        salt: another salt is another choice.
    """
    bits_B = (_bits(t_B) << 32) + _bits(x.flatten(1)[:, 0])
    token_T = torch.arange(tokens, device=t_B.device)
    # Products wrap around: that mixes the digits, and the high half of the result is what is random.
    x = (bits_B[:, None] + 1) * _M1 + (token_T + 1) * _M2 + salt * 0x9E3779B97F4A7
    for _ in range(2):
        x = (x ^ (x >> 29)) * _M1
    scores = (x >> 20) & 0xFFFFFFFFF
    return scores.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


def _bits(x_B: Tensor) -> Tensor:
    """The digits of float32 numbers, as whole numbers of 32 bits in int64."""
    return x_B.float().contiguous().view(torch.int32).long()


def taken(x_BTD: Tensor, index_BK: Tensor) -> Tensor:
    """The tokens of those numbers: [B, K, D]."""
    return x_BTD.gather(1, index_BK.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))


def put_back(x_BTD: Tensor, index_BK: Tensor, part_BKD: Tensor) -> Tensor:
    """The stream with the tokens of those numbers replaced."""
    return x_BTD.scatter(1, index_BK.unsqueeze(-1).expand_as(part_BKD), part_BKD)
