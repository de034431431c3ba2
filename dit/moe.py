"""Mixture of feed-forward experts: each token goes to the k experts that its router likes best.

Everything is deterministic: rows move by permutations, whose gradients meet nowhere, and what a token gets back from its k
experts is summed in a fixed order. Shape suffixes: N tokens of the batch, D width, F feed-forward width, E experts, k experts
of a token, R rows of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ditscale.dit.config import DiTConfig
from ditscale.dit.layers import Linear, Mlp, activated
from ditscale.kernels import linear


class Experts(nn.Module):
    """The weights of E feed-forward layers, each like :class:`ditscale.dit.layers.Mlp`, one under the other."""

    def __init__(self, experts: int, width: int, hidden: int, *, swiglu: bool) -> None:
        super().__init__()
        self.swiglu = swiglu
        inner = hidden * (2 if swiglu else 1)
        self.fc1_weight = nn.Parameter(torch.empty(experts, inner, width))
        self.fc1_bias = nn.Parameter(torch.empty(experts, inner))
        self.fc2_weight = nn.Parameter(torch.empty(experts, width, hidden))
        self.fc2_bias = nn.Parameter(torch.empty(experts, width))

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Each expert's rows through it, the results one under the other."""
        # Parted once: the gradients are put together once.
        weights = zip(
            *(p.unbind(0) for p in (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)), strict=True
        )
        return torch.cat(
            [
                linear(activated(part, w1, b1, self.swiglu), w2, b2)
                for part, (w1, b1, w2, b2) in zip(parts, weights, strict=True)
            ]
        )


class Mixture(nn.Module):
    """Top-k routing over experts, with or without a capacity, and experts that every token goes to besides.

    A token's probabilities are a softmax over all experts; its k best experts' results are weighted by theirs
    (Switch, arXiv:2101.03961; DiT-MoE, arXiv:2407.11633). With a capacity an expert has R = ceil(capacity N k / E) rows;
    first choices come before second ones, then tokens in their order, and what finds no room is left out of the sum. The
    balance loss is ``E sum_e f_e p_e``, f_e the share of tokens' choices that went to expert e and p_e its mean probability:
    1 where all are used alike, E where one does everything (arXiv:2101.03961, equation 4). Padding behind a caption is routed
    last, into what room is left, and counts in no balance loss.

    N counts the tokens of one call, so a batch that is split has other balance losses, whose mean is not the whole's, and
    with a capacity, in evaluation too, what a sample gets depends on the samples beside it (under guidance its own
    unconditional half is one of them). Without a capacity no sample's result depends on others.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        d, f, swiglu = config.width, config.mlp_width, config.mlp == "swiglu"
        self.count, self.chosen, self.capacity = config.experts, config.experts_per_token, config.expert_capacity
        self.router = Linear(d, self.count, bias=False)
        self.experts = Experts(self.count, d, f, swiglu=swiglu)
        self.shared: Mlp | None = None
        if config.shared_experts:
            self.shared = Mlp(d, config.shared_experts * f, d, swiglu=swiglu)

    def forward(self, x_BTD: Tensor, lengths_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """([B, T, D], the balance loss); a sample's tokens behind its first ``lengths`` are padding."""
        x_ND = x_BTD.flatten(0, 1)
        scores_NE = self.router(x_ND)
        p_NE = (scores_NE if scores_NE.dtype == torch.float64 else scores_NE.float()).softmax(-1)
        gate_Nk, expert_Nk = p_NE.topk(self.chosen, dim=-1)
        used = (expert_Nk.unsqueeze(-1) == torch.arange(self.count, device=x_BTD.device)).sum((0, 1))
        padding_N = None
        if lengths_B is None:
            balance = self.count * (used / expert_Nk.numel() * p_NE.mean(0)).sum()
        else:
            padding_N = (torch.arange(x_BTD.shape[1], device=x_BTD.device) >= lengths_B[:, None]).flatten()
            balance = self._balance(p_NE, expert_Nk, ~padding_N)
        # First choices of all tokens, then second ones: row c * N + n is the c-th choice of token n.
        expert = expert_Nk.t().flatten()
        rows = x_ND.repeat(self.chosen, 1)
        # Of an expert's rows padding comes last, so that it takes no room from a token.
        key = expert if padding_N is None else 2 * expert + padding_N.repeat(self.chosen)
        order = key.argsort(stable=True)
        if self.capacity is None:
            y = self._exactly(rows, order, used)
        else:
            y = self._with_capacity(rows, expert, order, used)
        y_ND = (y.unflatten(0, (self.chosen, -1)) * gate_Nk.t().unsqueeze(-1).to(y.dtype)).sum(0)
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view(x_BTD.shape), balance

    def _balance(self, p_NE: Tensor, expert_Nk: Tensor, counts_N: Tensor) -> Tensor:
        """The balance loss of the tokens that count; numbers stay on their device."""
        total = counts_N.sum()
        chosen = expert_Nk.unsqueeze(-1) == torch.arange(self.count, device=p_NE.device)
        share_E = (chosen & counts_N.view(-1, 1, 1)).sum((0, 1)) / (total * self.chosen)
        return self.count * (share_E * (p_NE * counts_N.unsqueeze(-1)).sum(0) / total).sum()

    def _exactly(self, rows: Tensor, order: Tensor, used: Tensor) -> Tensor:
        """Every row to its expert, as many as there are."""
        if rows.is_meta:  # numbers are not known there, and any split costs the same
            share, more = divmod(len(rows), self.count)
            sizes = [share + (e < more) for e in range(self.count)]
        else:
            sizes = used.tolist()
        out = self.experts(rows.index_select(0, order).split(sizes))
        return out.index_select(0, inverse(order))

    def _with_capacity(self, rows: Tensor, expert: Tensor, order: Tensor, used: Tensor) -> Tensor:
        """At most R rows to each expert; zeros come back for the others."""
        room = math.ceil(self.capacity * len(rows) / self.count)  # type: ignore[operator]
        start = used.cumsum(0) - used
        place = inverse(order) - start[expert]
        # A slot's row is the one at its place in order; beyond the expert's last row, and for a row without a slot, it is
        # an extra row of zeros.
        at = torch.arange(room, device=rows.device)
        source = torch.where(at < used[:, None], start[:, None] + at, len(rows)).flatten()
        source = F.pad(order, (0, 1), value=len(rows))[source]
        out = self.experts(F.pad(rows, (0, 0, 0, 1)).index_select(0, source).split(room))
        slot = torch.where(place < room, expert * room + place, len(out))
        return F.pad(out, (0, 0, 0, 1)).index_select(0, slot)


def inverse(order: Tensor) -> Tensor:
    """The permutation that undoes ``order``."""
    out = torch.empty_like(order)
    out[order] = torch.arange(len(order), device=order.device)
    return out
