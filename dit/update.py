"""What happens to the weights in a step, after the gradients: norm, clipping, AdamW or Muon, moving averages.

Everything is elementwise over each rank's own part of a weight, so it is the same code for whole, replicated and sharded
weights. Only the norm is summed over ranks, and only Muon needs whole matrices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ditscale.dit.average import Profile, WeightAverage
from ditscale.dit.muon import momentum_ahead, orthogonal_steps
from ditscale.errors import InputError


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; told by its method, because importing the class takes a second."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; the tensor itself where it is whole."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor, on every rank; all ranks must ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like_parameter(part: Tensor, parameter: Tensor) -> Tensor:
    """A rank's part as the tensor it is a part of, sharded as ``parameter`` is."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        parameter.device_mesh,  # type: ignore[attr-defined]
        parameter.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def own_part(tensor: Tensor, parameter: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has whole, sharded as ``parameter`` is."""
    if not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every rank has the same, so nothing is sent.
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """How gradients become steps.

    Args:
        beta1, beta2, eps: of AdamW. Default: 0.9, 0.95 and 1e-8.
        clip: largest norm of the gradient. Default: 1.0.
        muon: whether the blocks' matrices step by Muon, with ``muon_lr`` instead of their group's rate. Default: False.
        muon_lr, muon_momentum: of Muon. Default: 0.02 and 0.95.
        averages: profiles of the moving averages, the first of which is evaluated. Default: a share of 0.05.
    """

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    muon: bool = False
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    averages: tuple[Profile, ...] = (Profile("share", 0.05),)


@dataclass
class _Group:
    """Parameters that step alike."""

    lr: float
    weight_decay: float
    muon: bool
    names: list[str]


class Updater:
    """Owns the optimizer's state and the moving averages of a model's weights.

    Args:
        model: whose parameters are updated in place.
        groups: as ``parameter_groups`` gives them; each holds "params", "lr" and "weight_decay".
        rule: how.
        sum_squares: adds up a squared norm over the ranks that hold parts of the weights. Default: the weights are whole.

    Attributes:
        updates: steps taken.
        averages: the moving averages, the first of which is the one that is evaluated.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        rule: UpdateRule,
        *,
        sum_squares: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.rule = rule
        self.updates = 0
        self._sum_squares = sum_squares
        self._parameters = dict(model.named_parameters())
        self._parts = {name: local_part(p.detach()) for name, p in self._parameters.items()}
        names = {id(p): name for name, p in self._parameters.items()}
        self._groups: list[_Group] = []
        for group in groups:
            members = [names[id(p)] for p in group["params"]]
            by_muon = [
                n
                for n in members
                if rule.muon and n.startswith(("blocks.", "single_blocks.")) and self._parameters[n].ndim >= 2
            ]
            by_adamw = [n for n in members if n not in set(by_muon)]
            if by_adamw:
                self._groups.append(_Group(group["lr"], group["weight_decay"], False, by_adamw))
            if by_muon:
                self._groups.append(_Group(rule.muon_lr, group["weight_decay"], True, by_muon))
        self._muon = {n for g in self._groups if g.muon for n in g.names}
        self._first = {name: torch.zeros_like(p) for name, p in self._parts.items()}
        self._second = {name: torch.zeros_like(p) for name, p in self._parts.items() if name not in self._muon}
        self.averages = [WeightAverage(self._parts, profile) for profile in rule.averages]

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, a float32 scalar on the gradients' device."""
        norm = nn.utils.get_total_norm(self._gradients(self._parts))
        return norm if self._sum_squares is None else self._sum_squares(norm.square()).sqrt()

    @torch.no_grad()
    def apply(self, norm: Tensor, rate: float) -> None:
        """Clip the gradients by their norm, step, and move the averages on.

        Args:
            norm: as :meth:`gradient_norm` gave it.
            rate: what every group's learning rate is multiplied by.
        """
        self.updates += 1
        gradients = self._gradients(self._parts)
        scale = (self.rule.clip / (norm + 1e-6)).clamp(max=1.0)
        if gradients[0].device.type == "cpu":
            for gradient in gradients if float(scale) != 1.0 else ():
                gradient.mul_(scale)
        else:
            torch._foreach_mul_(gradients, scale)
        for group in self._groups:
            (self._muon_step if group.muon else self._adamw_step)(group, group.lr * rate)
        for average in self.averages:
            average.update(list(self._parts.values()), self.updates)

    def _gradients(self, names: Iterator[str] | Sequence[str] | Mapping[str, Any]) -> list[Tensor]:
        found = []
        for name in names:
            gradient = self._parameters[name].grad
            if gradient is None:
                raise InputError(f"model: expected a gradient of every parameter, got none of {name}")
            found.append(local_part(gradient))
        return found

    def _adamw_step(self, group: _Group, lr: float) -> None:
        parts = [self._parts[name] for name in group.names]
        done = torch.tensor(float(self.updates - 1), device=parts[0].device)
        adamw(
            parts,
            self._gradients(group.names),
            [self._first[name] for name in group.names],
            [self._second[name] for name in group.names],
            [],
            list(done.repeat(len(parts)).unbind()),
            fused=True,
            amsgrad=False,
            beta1=self.rule.beta1,
            beta2=self.rule.beta2,
            lr=lr,
            weight_decay=group.weight_decay,
            eps=self.rule.eps,
            maximize=False,
        )

    def _muon_step(self, group: _Group, lr: float) -> None:
        parameters = [self._parameters[name] for name in group.names]
        parts = [self._parts[name] for name in group.names]
        buffers = [self._first[name] for name in group.names]
        ahead = momentum_ahead(self._gradients(group.names), buffers, self.rule.muon_momentum)
        # Momentum is elementwise; only to be made orthogonal must a matrix be whole.
        matrices = [whole(like_parameter(a, p)) for a, p in zip(ahead, parameters, strict=True)]
        dtype = torch.bfloat16 if parts[0].device.type == "cuda" else torch.float32
        updates = [own_part(u, p) for u, p in zip(orthogonal_steps(matrices, dtype=dtype), parameters, strict=True)]
        if group.weight_decay:
            torch._foreach_mul_(parts, 1 - lr * group.weight_decay)
        torch._foreach_add_(parts, updates, alpha=-lr)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint keeps beside the weights, by name; the live tensors, sharded as the weights are."""
        kinds = {"first": self._first, "second": self._second}
        kinds |= {f"average.{i}": average.weights for i, average in enumerate(self.averages)}
        return {f"{kind}.{name}": t for kind, parts in kinds.items() for name, t in self.shared(parts).items()}

    def shared(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's parts by their parameters' names, as the tensors they are parts of."""
        return {name: like_parameter(part, self._parameters[name]) for name, part in parts.items()}

    @contextlib.contextmanager
    def averaged(self, which: int = 0) -> Iterator[None]:
        """While this lasts, the model's weights are an average."""
        kept = {name: part.clone() for name, part in self._parts.items()}
        with torch.no_grad():
            for name, part in self._parts.items():
                part.copy_(self.averages[which].weights[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, part in self._parts.items():
                    part.copy_(kept[name])
