"""What a training loop has spent: model, hardware and encoder FLOPs, its share of the peak, and what a budget
still pays for.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ditscale.dit.checks import need_choice, need_whole
from ditscale.dit.config import DiTConfig
from ditscale.dit.encoders import AutoencoderSpec, TextEncoderSpec
from ditscale.dit.flops import count
from ditscale.errors import InputError
from ditscale.peaks import Peak, find_peak

CHARGES = ("model", "hardware", "everything")
_WINDOW = 20
_COUNTERS = (
    "steps",
    "samples",
    "tokens",
    "model_flops",
    "hardware_flops",
    "encoder_flops",
    "optimizer_flops",
    "nanoseconds",
)


class StepCost(NamedTuple):
    """FLOPs of one step, over all devices.

    Attributes:
        model: forward and backward of the model, as the mathematics needs them (for MFU and for scaling
            laws).
        hardware: the same, with recomputed activations and the scores that fused attention forms again (for
            HFU).
        encoder: frozen encoders that run on the fly.
        optimizer: update, averaging and clipping.
        tokens: image tokens.
    """

    model: int
    hardware: int
    encoder: int
    optimizer: int
    tokens: int


class FlopMeter:
    """Counts along with a training loop; integers throughout, so it is exact across a resume.

    Args:
        config: the model that is trained.
        image_size: as in ``ditscale.dit.flops.count``.
        recompute: activations that are computed again, as in ``count``. Default: "none".
        autoencoder, text_encoders: encoders that run on the fly. Default: none.
        optimizer, ema, clip: what happens to the weights each step. Defaults: "adamw", False, False.
        device: name of one accelerator, for MFU and HFU; an unknown one gives None for both. Default: None.
        dtype: of the matrix products. Default: "bfloat16".
        devices: accelerators that work together. Default: 1.
        budget: FLOPs to spend. Default: None.
        charge: what the budget pays for: "model", "hardware" or "everything" (hardware, encoders, optimizer).
            Default: "model".

    Raises:
        InputError: an argument is not possible.
    """

    def __init__(
        self,
        config: DiTConfig,
        image_size: int | tuple[int, int] | None = None,
        *,
        recompute: str | Sequence[str] = "none",
        autoencoder: str | AutoencoderSpec | None = None,
        text_encoders: Sequence[str | TextEncoderSpec] = (),
        optimizer: str | None = "adamw",
        ema: bool = False,
        clip: bool = False,
        device: str | None = None,
        dtype: str = "bfloat16",
        devices: int = 1,
        budget: float | None = None,
        charge: str = "model",
    ) -> None:
        need_whole("devices", devices, 1)
        need_choice("charge", charge, CHARGES)
        if budget is not None and not 0 < budget < float("inf"):
            raise InputError(f"budget: expected a number of FLOPs above 0, got {budget!r}")
        self.config = config
        self.peak: Peak | None = find_peak(device, dtype)
        self.devices = devices
        self.budget = None if budget is None else int(budget)
        self.charge = charge
        self._image_size = image_size
        self._recompute = recompute
        self._extras = {
            "optimizer": optimizer,
            "ema": ema,
            "clip": clip,
            "autoencoder": autoencoder,
            "text_encoders": tuple(text_encoders),
        }
        self._costs: dict[Any, StepCost] = {}
        self._recent: deque[tuple[StepCost, int]] = deque(maxlen=_WINDOW)
        self.steps = self.samples = self.tokens = 0
        self.model_flops = self.hardware_flops = self.encoder_flops = self.optimizer_flops = 0
        self.nanoseconds = 0
        self.cost(1)  # what cannot be counted should be known before training, not in its first step

    def cost(
        self,
        batch: int = 1,
        *,
        lengths: Sequence[int] | None = None,
        context_lengths: Sequence[int] | None = None,
    ) -> StepCost:
        """FLOPs of one step on a batch; packed batches by their lengths, as in ``count``."""
        key = (
            batch,
            None if lengths is None else tuple(lengths),
            None if context_lengths is None else tuple(context_lengths),
        )
        known = self._costs.get(key)
        if known is not None:
            return known
        packed = {"lengths": lengths, "context_lengths": context_lengths}
        report = count(self.config, self._image_size, batch, **packed, **self._extras)  # type: ignore[arg-type]
        spent = count(
            self.config,
            self._image_size,
            batch,
            convention="hardware",
            recompute=self._recompute,
            **packed,  # type: ignore[arg-type]
        ).train
        optimizer = sum(line.forward for line in report.extras if line.operation == "optimizer")
        encoder = sum(line.forward for line in report.extras) - optimizer
        tokens = report.tokens if lengths is not None else report.tokens * report.batch
        cost = StepCost(report.train, spent, encoder, optimizer, tokens)
        if len(self._costs) < 1024:  # packed batches seldom repeat
            self._costs[key] = cost
        return cost

    def step(
        self,
        batch: int = 1,
        seconds: float | None = None,
        *,
        lengths: Sequence[int] | None = None,
        context_lengths: Sequence[int] | None = None,
    ) -> StepCost:
        """Count one optimizer step.

        Args:
            batch: samples of the step, over all devices and accumulated batches.
            seconds: how long it took. Default: None, which leaves MFU and HFU to the steps that say.
            lengths, context_lengths: tokens of each sample of a packed batch, instead of ``batch``.
        """
        cost = self.cost(batch, lengths=lengths, context_lengths=context_lengths)
        self.steps += 1
        self.samples += len(lengths) if lengths is not None else len(context_lengths or ()) or batch
        self.tokens += cost.tokens
        self.model_flops += cost.model
        self.hardware_flops += cost.hardware
        self.encoder_flops += cost.encoder
        self.optimizer_flops += cost.optimizer
        if seconds is not None:
            if not seconds > 0:
                raise InputError(f"seconds: expected a time above 0, got {seconds!r}")
            self.nanoseconds += round(seconds * 1e9)
            self._recent.append((cost, round(seconds * 1e9)))
        return cost

    @property
    def spent(self) -> int:
        """FLOPs charged to the budget so far."""
        return self._charged(self.model_flops, self.hardware_flops, self.encoder_flops + self.optimizer_flops)

    def steps_left(self, batch: int = 1) -> int | None:
        """Whole steps on ``batch`` samples that the rest of the budget pays for; None without a budget."""
        if self.budget is None:
            return None
        cost = self.cost(batch)
        each = self._charged(cost.model, cost.hardware, cost.encoder + cost.optimizer)
        return max(0, self.budget - self.spent) // each

    def _charged(self, model: int, hardware: int, beside: int) -> int:
        """What of some FLOPs the budget pays for."""
        return {"model": model, "hardware": hardware, "everything": hardware + beside}[self.charge]

    @property
    def mfu(self) -> float | None:
        """Model FLOPs a second over the peak of all devices, in the last steps that had a time; None where
        unknown.
        """
        return self._share("model")

    @property
    def hfu(self) -> float | None:
        """Hardware FLOPs a second over the peak of all devices, likewise."""
        return self._share("hardware")

    @property
    def flops_per_second(self) -> float | None:
        """Model FLOPs a second in the last steps that had a time, over all devices."""
        took = sum(ns for _, ns in self._recent)
        return sum(cost.model for cost, _ in self._recent) * 1e9 / took if took else None

    def _share(self, which: str) -> float | None:
        took = sum(ns for _, ns in self._recent)
        if not took or self.peak is None:
            return None
        done = sum(getattr(cost, which) for cost, _ in self._recent)
        return float(done * 1e9 / (took * self.peak.flops * self.devices))

    def summary(self) -> dict[str, Any]:
        """All counters and ratios as plain values, for a log line or a run's record."""
        content: dict[str, Any] = {name: getattr(self, name) for name in _COUNTERS if name != "nanoseconds"}
        return content | {
            "seconds": self.nanoseconds / 1e9,
            "mfu": self.mfu,
            "hfu": self.hfu,
            "budget": self.budget,
            "convention": "matmul",
            "charge": self.charge,
            "spent": self.spent,
            "devices": self.devices,
            "peak": None if self.peak is None else self.peak._asdict(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; whole numbers, so a resumed meter goes on exactly."""
        return {name: getattr(self, name) for name in _COUNTERS} | {"counts": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: the state is of a meter that counts something else, or is damaged.
        """
        # Recomputation, which a run may change as it goes on, was part of it at first.
        earlier = {self._fingerprint([known]) for known in ("none", "block", "attention", self._recompute)}
        if state.get("counts") not in {self._fingerprint(), *earlier}:
            raise InputError("state: expected that of a meter of the same model and encoders, got another's")
        for name in _COUNTERS:
            need_whole(f"state.{name}", state.get(name), 0)
        for name in _COUNTERS:
            setattr(self, name, state[name])
        self._recent.clear()

    def _fingerprint(self, more: Sequence[Any] = ()) -> str:
        """What is counted, so that two meters' numbers are not added up by mistake."""
        content = [self.config.to_dict(), self._image_size, *more, self._extras]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()[:16]
