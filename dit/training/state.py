"""All that changes while a run trains, and its way into a checkpoint and out of it."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from ditscale.dit.checkpoint import Checkpoint, has_checkpoint, newest_checkpoint, save_checkpoint
from ditscale.dit.meter import FlopMeter
from ditscale.dit.model import DiT
from ditscale.dit.optim import parameter_groups
from ditscale.dit.seeds import seed_for
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.execution import Execution
from ditscale.dit.training.ranks import Ranks
from ditscale.dit.training.record import device_name, now
from ditscale.dit.update import Updater, UpdateRule
from ditscale.errors import InputError


def repeat_blocks(model: DiT) -> None:
    """From now on each block's activations are computed again in the backward pass: what the ledger calls "fused-block"."""
    for block in model.blocks:
        block.forward = functools.partial(recomputed, block.forward, use_reentrant=False)


class TrainState:
    """Model, optimizer, averaged weights and counters of one run.

    Random numbers are none of it: each follows from the seed and the step's number.

    Attributes:
        model: the model; ``called`` is what to call in its place when training.
        updater: optimizer state and averages.
        meter: FLOPs spent.
        step: steps done, which is also the position in the data.
        nonfinite: what is known of each step whose loss or gradient was NaN or infinite.
        skipped: steps in a row, up to this one, that were left out for that.
        smoothed: the training loss, averaged over the last images; NaN before the first step that was taken.
        seconds: time spent training, over all sessions.
        started_at: when the first session began.
    """

    def __init__(self, config: TrainConfig, execution: Execution, ranks: Ranks) -> None:
        self.ranks = ranks
        torch.manual_seed(seed_for(config.seed, "weights"))
        self.model = DiT(config.model).to(ranks.device)
        if execution.recompute == "block":
            repeat_blocks(self.model)
        if execution.compile:
            for block in self.model.blocks:
                block.compile()
        self.called = ranks.distribute(self.model)
        rule = UpdateRule(
            beta1=config.beta1,
            beta2=config.beta2,
            clip=config.clip,
            muon=config.optimizer == "muon",
            muon_lr=config.muon_lr,
            muon_momentum=config.muon_momentum,
            averages=config.profiles,
        )
        groups = parameter_groups(self.model, lr=config.lr, weight_decay=config.weight_decay)
        self.updater = Updater(self.model, groups, rule, sum_squares=ranks.sum_squares())
        self.meter = FlopMeter(
            config.model,
            recompute="fused-block" if execution.recompute == "block" else "none",
            # The ledger has no line for Muon, whose products depend on the shapes of its matrices.
            optimizer="adamw" if config.optimizer == "adamw" else None,
            ema=True,
            clip=True,
            device=device_name(ranks.device),
            dtype=config.precision,
            devices=ranks.count,
        )
        self.step = 0
        self.nonfinite: list[dict[str, Any]] = []
        self.skipped = 0
        self.smoothed = math.nan
        self.seconds = 0.0
        self.started_at = now()

    def _tensors(self) -> dict[str, Tensor]:
        """The live tensors by name, sharded as the weights are."""
        return {f"model.{name}": t for name, t in self.model.state_dict().items()} | self.updater.tensors()

    def _scalars(self) -> dict[str, Any]:
        return {
            "updates": self.updater.updates,
            "nonfinite": self.nonfinite,
            "skipped": self.skipped,
            "smoothed": None if math.isnan(self.smoothed) else self.smoothed,  # JSON has no NaN
            "seconds": self.seconds,
            "started_at": self.started_at,
            "meter": self.meter.state_dict(),
        }

    def save(self, folder: Path) -> None:
        """Write a checkpoint, together with the other ranks, unless there is a whole one of this step.

        Raises:
            InputError: it cannot be written; those before it are as they were.
        """
        if self.ranks.on_first(lambda: has_checkpoint(folder, self.step)):
            return  # a save that failed half-way would have cost it
        if self.ranks.count == 1:
            save_checkpoint(folder, self.step, self._tensors(), self._scalars())
        else:
            from ditscale.dit.training.shards import save_shards

            save_shards(folder, self.step, self._tensors(), self._scalars(), self.ranks)

    def restore(self, folder: Path) -> tuple[Checkpoint | None, list[str]]:
        """Go on from the newest whole checkpoint of a folder, written by any number of ranks, if there is one.

        Returns:
            The checkpoint, and a sentence for every damaged one that was passed over.

        Raises:
            InputError: the checkpoint is of another model.
        """
        found: Checkpoint | None
        found, complaints = self.ranks.on_first(lambda: newest_checkpoint(folder))
        if found is None:
            return None, complaints
        try:
            self._read(found)
            state = found.state
            self.meter.load_state_dict(state["meter"])
            self.updater.updates = state["updates"]
            # Earlier versions kept no number of skipped steps.
            self.nonfinite, self.skipped = list(state["nonfinite"]), state.get("skipped", 0)
            self.smoothed = math.nan if state["smoothed"] is None else state["smoothed"]
            self.seconds, self.started_at = state["seconds"], state["started_at"]
        except (KeyError, RuntimeError, InputError) as error:
            raise InputError(f"{found.directory}: expected a checkpoint of this model, got {error}") from error
        self.step = found.step
        return found, complaints

    @torch.no_grad()
    def _read(self, checkpoint: Checkpoint) -> None:
        mine = self._tensors()
        if self.ranks.count == 1 and checkpoint.one_file:
            theirs = checkpoint.tensors()
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])
        else:
            from ditscale.dit.training.shards import load_shards

            load_shards(checkpoint.directory, mine)
