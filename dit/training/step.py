"""One optimizer step: passes over the batch, the gradient's norm, and the update."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ditscale.dit.objective import Objective
from ditscale.dit.training.batches import StepInputs
from ditscale.dit.update import Updater


class Stepper:
    """Turns the inputs of a step into gradients, and gradients into new weights.

    Args:
        model: trained in place.
        flow: the objective.
        updater: owns the optimizer's state.
        called: what is called in place of ``model``, such as a wrapper that shares gradients. Default: ``model``.
        accumulating: makes a context in which backward passes add up gradients without sharing them. Default: none.
        precision: "float32", or "bfloat16": weights, optimizer and averages stay float32, matrix products and
            activations are bfloat16 by autocast. Default: "float32".
        microbatch: images of one pass. Default: all of the step's.
        balance_weight: of a mixture of experts' balance loss, which is added to what is minimised and to no loss that is
            told. Default: 0.01.
    """

    def __init__(
        self,
        model: nn.Module,
        flow: Objective,
        updater: Updater,
        *,
        called: nn.Module | None = None,
        accumulating: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        precision: str = "float32",
        microbatch: int | None = None,
        balance_weight: float = 0.01,
    ) -> None:
        self.model, self.flow, self.updater = model, flow, updater
        self.called = called if called is not None else model
        self.accumulating, self.precision, self.microbatch = accumulating, precision, microbatch
        self.balance_weight = balance_weight
        self._parameters = list(model.parameters())

    def losses(self, inputs: StepInputs) -> Tensor:
        """The loss of each image, [n] float32."""
        with self._autocast():
            return self.flow.loss(self.called, *inputs)

    def loss(self, inputs: StepInputs) -> Tensor:
        """The mean loss of a batch, float32."""
        return self.losses(inputs).mean()

    def gradients(self, inputs: StepInputs) -> tuple[float, Tensor]:
        """Leave the gradient of the batch's mean loss in the parameters.

        Returns:
            The mean loss over this process's share, and the norm of the whole gradient.
        """
        for parameter in self._parameters:
            parameter.grad = None
        share = len(inputs.x_0)
        size = self.microbatch or share
        losses: list[Tensor] = []  # read behind the last pass: a GPU is not waited for between two of them
        for start in range(0, share, size):
            rows = slice(start, start + size)
            part = inputs if size == share else inputs.changed(operator.itemgetter(rows))
            last = start + size >= share
            with contextlib.nullcontext() if last else self.accumulating():
                loss = self.loss(part)
                losses.append(loss.detach())
                balance = getattr(self.model, "balance_loss", None)
                if balance is not None:
                    loss = loss + self.balance_weight * balance
                if size < share:
                    loss = loss * (size / share)
                loss.backward()
        norm = self.updater.gradient_norm()
        return sum(loss.item() * size / share for loss in losses), norm

    def __call__(self, inputs: StepInputs, rate: float = 1.0) -> float:
        """One whole step; returns the loss."""
        loss, norm = self.gradients(inputs)
        self.updater.apply(norm, rate)
        return loss

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._parameters[0].device.type, dtype=torch.bfloat16)
