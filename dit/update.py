"""What happens to the weights in a step, after the gradients: norm, clipping, AdamW or Muon, moving averages.

Everything is elementwise over each rank's own part of a weight, so it is the same code for whole, replicated and sharded
weights. Only the norm is summed over ranks, and only Muon needs whole matrices. On a CPU, where a call costs more than the
arithmetic on a small weight, small weights lie in one piece of memory and are gone over together.
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
from ditscale.dit.mup import hidden_matrices
from ditscale.errors import InputError
from ditscale.kernels.adamw.op import adamw_average_, serves

# Weights of at most so many numbers are small: copying their gradients together takes less time than calls for each.
_SMALL = 2**15


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
    """Parameters that step alike; the first ``small`` of them lie in one piece of memory."""

    lr: float
    weight_decay: float
    muon: bool
    names: list[str]
    small: int = 0

    def together(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """What there is to go over: a copy of the small ones in one piece, and the large ones."""
        large = [tensors[name] for name in self.names[self.small :]]
        if not self.small:
            return large
        return [torch.cat([tensors[name].flatten() for name in self.names[: self.small]]), *large]

    def lay(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        """:meth:`together`, the small ones in ``tensors`` replaced by their parts of that piece."""
        pieces, names = self.together(tensors), self.names[: self.small]
        if names:
            parts = pieces[0].split([tensors[name].numel() for name in names])
            tensors.update({name: part.view_as(tensors[name]) for name, part in zip(names, parts, strict=True)})
        return pieces


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
        self._model = model
        self._sum_squares = sum_squares
        self._parameters = dict(model.named_parameters())
        self._parts = {name: local_part(p.detach()) for name, p in self._parameters.items()}
        named = {id(p): name for name, p in self._parameters.items()}
        # Experts' biases and modulation tables have two axes too, but are no linear maps.
        matrices = {n for n in hidden_matrices(model) if rule.muon and n.startswith("blocks.")}
        self._groups: list[_Group] = []
        for group in groups:
            members = [named[id(p)] for p in group["params"]]
            by_muon = [n for n in members if n in matrices]
            by_adamw = [n for n in members if n not in set(by_muon)]
            if by_adamw:
                small = [n for n in by_adamw if self._is_small(n)]
                # Lengths that fill whole cache lines first, so that what stands behind them begins at one.
                small.sort(key=lambda n: self._parts[n].numel() % 16 != 0)
                names = small + [n for n in by_adamw if n not in set(small)]
                self._groups.append(_Group(group["lr"], group["weight_decay"], False, names, len(small)))
            if by_muon:
                self._groups.append(_Group(rule.muon_lr, group["weight_decay"], True, by_muon))
        self._muon = {n for g in self._groups if g.muon for n in g.names}
        self._first = {name: torch.zeros_like(p) for name, p in self._parts.items()}
        self._second = {name: torch.zeros_like(p) for name, p in self._parts.items() if name not in self._muon}
        # What a step goes over: of every group weights, first and second moments.
        self._pieces = [
            (each.lay(self._parts), each.lay(self._first), [] if each.muon else each.lay(self._second))
            for each in self._groups
        ]
        for name in [name for group in self._groups for name in group.names[: group.small]]:
            self._parameters[name].data = self._parts[name]
        self.averages = [WeightAverage(self._parts, profile, lay=self._lay) for profile in rule.averages]
        self._gradients: list[list[Tensor]] = []
        written = [t for pieces in self._pieces for kind in pieces for t in kind] + self.averages[0].pieces
        self._in_one_pass = not self._muon and serves(*written)

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, a float32 scalar on the gradients' device."""
        self._gradients = self._gather()
        norm = nn.utils.get_total_norm([piece for pieces in self._gradients for piece in pieces])
        return norm if self._sum_squares is None else self._sum_squares(norm.square()).sqrt()

    @torch.no_grad()
    def apply(self, norm: Tensor, rate: float) -> None:
        """Clip the gradients by their norm, step, and move the averages on.

        Args:
            norm: as :meth:`gradient_norm` gave it, of the gradients that it saw.
            rate: what every group's learning rate is multiplied by.
        """
        self.updates += 1
        clip = (self.rule.clip / (norm + 1e-6)).clamp(max=1.0)
        taken = self._step_in_one_pass(float(clip), rate) if self._in_one_pass else self._step_by_passes(clip, rate)
        self._gradients = []
        for average in self.averages[taken:]:
            average.update([piece for weights, *_ in self._pieces for piece in weights], self.updates)

    def _step_in_one_pass(self, clip: float, rate: float) -> int:
        """Clip, step and move the first average on, one piece after another; returns how many averages that were."""
        average, rule = self.averages[0], self.rule
        places = iter(average.pieces)
        for group, (weights, first, second), gradients in zip(self._groups, self._pieces, self._gradients, strict=True):
            for tensors in zip(weights, gradients, first, second, places):  # noqa: B905 (places are of all groups)
                adamw_average_(
                    *tensors,
                    step=self.updates,
                    lr=group.lr * rate,
                    beta1=rule.beta1,
                    beta2=rule.beta2,
                    eps=rule.eps,
                    weight_decay=group.weight_decay,
                    clip=clip,
                    decay=average.profile.decay(self.updates),
                )
        return 1

    def _step_by_passes(self, clip: Tensor, rate: float) -> int:
        """The same by PyTorch's own passes over all pieces, for GPUs and Muon; takes no average."""
        gradients = [piece for pieces in self._gradients for piece in pieces]
        if gradients[0].device.type == "cpu":
            for gradient in gradients if float(clip) != 1.0 else ():
                gradient.mul_(clip)
        else:
            torch._foreach_mul_(gradients, clip)
        for group, pieces, grads in zip(self._groups, self._pieces, self._gradients, strict=True):
            if group.muon:
                self._muon_step(group, grads, group.lr * rate)
            else:
                self._adamw_step(group, grads, *pieces, group.lr * rate)
        return 0

    def _is_small(self, name: str) -> bool:
        part, whole = self._parts[name], not is_sharded(self._parameters[name])
        return whole and part.device.type == "cpu" and part.dtype == torch.float32 and part.numel() <= _SMALL

    def _lay(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        return [piece for group in self._groups for piece in group.lay(tensors)]

    def _gather(self) -> list[list[Tensor]]:
        """Of every group the gradients, laid as its weights are; large ones are the parameters' own."""
        found = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                raise InputError(f"model: expected a gradient of every parameter, got none of {name}")
            found[name] = local_part(parameter.grad)
        return [group.together(found) for group in self._groups]

    def _adamw_step(
        self,
        group: _Group,
        gradients: list[Tensor],
        weights: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        lr: float,
    ) -> None:
        done = torch.tensor(float(self.updates - 1), device=weights[0].device)
        adamw(
            weights,
            gradients,
            first,
            second,
            [],
            list(done.repeat(len(weights)).unbind()),
            fused=True,
            amsgrad=False,
            beta1=self.rule.beta1,
            beta2=self.rule.beta2,
            lr=lr,
            weight_decay=group.weight_decay,
            eps=self.rule.eps,
            maximize=False,
        )

    def _muon_step(self, group: _Group, gradients: list[Tensor], lr: float) -> None:
        parameters = [self._parameters[name] for name in group.names]
        parts = [self._parts[name] for name in group.names]
        buffers = [self._first[name] for name in group.names]
        ahead = momentum_ahead(gradients, buffers, self.rule.muon_momentum)
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
        self._write(self.averages[which].weights)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        """Give the model's weights these values, in every copy of them."""
        for name, part in self._parts.items():
            part.copy_(values[name])
        # After a forward pass a sharded model keeps the weights outside its blocks gathered for the backward pass. Where
        # none came, the next forward pass would take that copy for the weights.
        if hasattr(self._model, "reshard"):
            self._model.reshard()  # type: ignore[operator]
