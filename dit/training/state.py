"""All that changes while a run trains, and its way into a checkpoint and out of it."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ditscale.dit.checkpoint import Checkpoint
from ditscale.dit.model import DiT
from ditscale.dit.optim import WeightAverage, parameter_groups
from ditscale.dit.training.batches import seed_for
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.record import now
from ditscale.errors import InputError


class TrainState:
    """Model, optimizer, averaged weights and counters of one run.

    Random numbers are none of it: each follows from the seed and the step's number.

    Attributes:
        step: optimizer steps done, which is also the position in the data.
        smoothed: the training loss, averaged over the last images.
        seconds: time spent training, over all sessions.
        started_at: when the first session began.
    """

    def __init__(self, config: TrainConfig) -> None:
        torch.manual_seed(seed_for(config.seed, "weights"))
        self.model = DiT(config.model)
        groups = parameter_groups(self.model, lr=config.lr, weight_decay=config.weight_decay)
        self.base_rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
        self.average = WeightAverage(self.model, share=config.ema_share)
        self.step = 0
        self.smoothed = math.nan
        self.seconds = 0.0
        self.started_at = now()

    def checkpoint(self) -> Checkpoint:
        """The state as it is now; the tensors are the live ones."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            state = self.optimizer.state[parameter]
            tensors[f"model.{name}"] = parameter
            tensors[f"average.{name}"] = self.average.weights[name]
            tensors[f"adam_step.{name}"] = state["step"]
            tensors[f"adam_m.{name}"] = state["exp_avg"]
            tensors[f"adam_v.{name}"] = state["exp_avg_sq"]
        state = {"smoothed": self.smoothed, "seconds": self.seconds, "started_at": self.started_at}
        return Checkpoint(self.step, tensors, state)

    def restore(self, checkpoint: Checkpoint, source: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it is of another model.
        """
        tensors = checkpoint.tensors
        try:
            parameters = dict(self.model.named_parameters())
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(tensors[f"model.{name}"])
                    self.average.weights[name].copy_(tensors[f"average.{name}"])
            for name, parameter in parameters.items():
                self.optimizer.state[parameter] = {
                    "step": tensors[f"adam_step.{name}"],
                    "exp_avg": tensors[f"adam_m.{name}"],
                    "exp_avg_sq": tensors[f"adam_v.{name}"],
                }
        except (KeyError, RuntimeError) as error:
            raise InputError(f"{source}: expected a checkpoint of this model, got {error}") from error
        self.step = checkpoint.step
        self.smoothed = checkpoint.state["smoothed"]
        self.seconds = checkpoint.state["seconds"]
        self.started_at = checkpoint.state["started_at"]
