"""What a run trains: everything that decides its result, and the name that follows from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ditscale.dit.average import Profile
from ditscale.dit.checks import is_number, is_whole, need_choice, need_flag, need_whole
from ditscale.dit.config import DiTConfig
from ditscale.dit.flops import count
from ditscale.dit.flow import RectifiedFlow
from ditscale.dit.objective import Objective, objective_from_dict
from ditscale.dit.optim import Schedule
from ditscale.errors import InputError

PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "muon")
_MOST_SEED = 2**63 - 1
_MOST_COUNT = 10_000_000


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides a run's result.

    Args:
        model: the DiT.
        data: "emoji_scenes", the embedded endless captioned scenes; "emoji_clips", the same in motion, for video models; or the
            path of a folder of images, WebDataset shards, cached latents, or a Hugging Face data set; see
            ``ditscale.dit.data.sources``. Default: "emoji_scenes".
        flip: show training images mirrored at half of their places. Default: False.
        prediction: what the network's output stands for, "velocity" or "clean"; see :class:`RectifiedFlow`. The loss is
            the velocity's either way. Default: "velocity".
        objective: another objective, such as ``DDPM()`` or ``EDM()``; in TOML a table with its ``name``. Default: None,
            rectified flow with the ``prediction`` above.
        batch: images a step. Default: 16.
        images: images in the whole run, rounded down to whole batches. Give this or ``flops``.
        flops: training FLOPs to spend by the ledger (convention ``matmul``), rounded down to whole batches.
        precision: "float32", or "bfloat16": weights, optimizer and averages stay float32, matrix products and activations
            are bfloat16 by autocast. Default: "float32".
        optimizer: "adamw", or "muon": the blocks' matrices step by Muon (``ditscale.dit.muon``), the rest by AdamW.
            Default: "adamw".
        muon_lr, muon_momentum: of the matrices that step by Muon; the rate needs no scaling by width. Default: 0.02
            and 0.95.
        lr: peak learning rate, at ``model.mup_base_width`` where that is set. Default: 2e-3.
        beta1, beta2, weight_decay: of AdamW. Default: 0.9, 0.95, 0.
        clip: largest norm of the gradient. Default: 1.0.
        warmup_fraction, decay_fraction: shares of the steps in which the rate rises, and falls to zero at the end; a
            ``decay_fraction`` of 0 keeps it constant, one of 1 lets it fall as soon as it has risen. Default: 0.05 and
            0.5.
        decay_shape: of the fall, "linear" or "cosine". Default: "linear".
        balance_weight: of the balance loss of a mixture of experts; 0.01 as in arXiv:2101.03961. Default: 0.01.
        condition_dropout: share of training images that see no condition. Default: 0.1.
        ema: rule of the averaged weights, which are evaluated and kept: "share" (they remember a share of training),
            "fixed" (one decay a step) or "power" (the profile of EDM2, kept along the way so that an average of any
            width can be put together afterwards); see ``ditscale.dit.average``. Default: "share".
        ema_share: share of training that "share" remembers. Default: 0.05.
        ema_decay: decay of "fixed". Default: 0.9999.
        ema_widths: relative widths of "power"; the first is evaluated. Default: 0.05 and 0.1.
        ema_snapshots: moments at which "power" keeps its averages. Default: 16.
        on_nonfinite: what a loss or gradient that is NaN or infinite does: "stop" ends the run as diverged, "skip" leaves
            that step's update out. Default: "stop".
        evaluation_images: images of the fixed validation set. Default: 128.
        evaluation_times: times at which each is evaluated. Default: 8.
        seed: of weights, data, noise and times. Default: 0.
        evaluation_seed: of the validation images and noise; the same for runs that are compared. Default: 0.

    Raises:
        InputError: a value is not possible; names it, what was expected and what came.
    """

    model: DiTConfig
    data: str = "emoji_scenes"
    flip: bool = False
    prediction: str = "velocity"
    objective: Objective | None = None
    batch: int = 16
    images: int | None = None
    flops: int | None = None
    precision: str = "float32"
    optimizer: str = "adamw"
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    lr: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    clip: float = 1.0
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.5
    decay_shape: str = "linear"
    balance_weight: float = 0.01
    condition_dropout: float = 0.1
    ema: str = "share"
    ema_share: float = 0.05
    ema_decay: float = 0.9999
    ema_widths: tuple[float, ...] = (0.05, 0.1)
    ema_snapshots: int = 16
    on_nonfinite: str = "stop"
    evaluation_images: int = 128
    evaluation_times: int = 8
    seed: int = 0
    evaluation_seed: int = 0

    def __post_init__(self) -> None:
        if (self.images is None) == (self.flops is None):
            raise InputError(f"images, flops: expected exactly one of them, got {self.images!r} and {self.flops!r}")
        for field, most in (("images", _MOST_SEED), ("flops", sys.float_info.max)):
            value = getattr(self, field)
            if value is not None:
                if not is_number(value) or not 0 <= value <= most:
                    raise InputError(f"{field}: expected a number above 0, up to {most:.3g}, got {value!r}")
                object.__setattr__(self, field, int(value))  # a TOML file's 1e17 is a float
        if not (self.objective is None or isinstance(self.objective, Objective)):
            raise InputError(f"objective: expected an objective such as DDPM(), or None, got {self.objective!r}")
        if self.objective is not None and self.prediction != "velocity":
            raise InputError(f"prediction: expected it in the objective, which is given, got {self.prediction!r}")
        self.flow.check_model(self.model)
        need_choice("precision", self.precision, PRECISIONS)
        need_choice("optimizer", self.optimizer, OPTIMIZERS)
        need_choice("on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        if not isinstance(self.ema_widths, (list, tuple)):
            raise InputError(f"ema_widths: expected a list of relative widths, got {self.ema_widths!r}")
        object.__setattr__(self, "ema_widths", tuple(self.ema_widths))
        _ = self.profiles  # checks the averages
        for field in ("batch", "evaluation_images", "evaluation_times", "ema_snapshots"):
            need_whole(field, getattr(self, field), 1, _MOST_COUNT)
        for field in ("seed", "evaluation_seed"):
            value = getattr(self, field)
            if not is_whole(value, 0, _MOST_SEED):
                raise InputError(f"{field}: expected a whole number from 0 to 2 ** 63 - 1, got {value!r}")
        if not isinstance(self.data, str) or not self.data:
            raise InputError(f"data: expected a name or a folder's path, got {self.data!r}")
        need_flag("flip", self.flip)
        self._check_rates()
        if self.steps < 1:
            asked = f"{self.images} images" if self.images is not None else f"{self.flops:.4g} FLOPs"
            raise InputError(
                f"{'images' if self.images is not None else 'flops'}: expected enough for one batch of {self.batch} "
                f"({count(self.model, batch=self.batch).train:.4g} FLOPs), got {asked}"
            )
        _ = self.schedule  # checks the decay's shape

    def _check_rates(self) -> None:
        for field in ("lr", "clip", "muon_lr"):
            value = getattr(self, field)
            if not (_is_number(value) and value > 0):
                raise InputError(f"{field}: expected a positive number, got {value!r}")
        for field in ("warmup_fraction", "decay_fraction", "condition_dropout", "muon_momentum", "balance_weight"):
            value = getattr(self, field)
            if not (_is_number(value) and 0 <= value <= 1):
                raise InputError(f"{field}: expected a number from 0 to 1, got {value!r}")
        if self.warmup_fraction + self.decay_fraction > 1 + 1e-9 and self.decay_fraction < 1:
            raise InputError(
                "warmup_fraction, decay_fraction: expected a sum of at most 1, or a decay_fraction of 1, got "
                f"{self.warmup_fraction!r} and {self.decay_fraction!r}"
            )
        for field in ("beta1", "beta2"):
            value = getattr(self, field)
            if not (_is_number(value) and 0 <= value < 1):
                raise InputError(f"{field}: expected a number from 0 to below 1, got {value!r}")
        if not (_is_number(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay: expected a number of at least 0, got {self.weight_decay!r}")

    @cached_property
    def steps(self) -> int:
        """Optimizer steps of the whole run; asked for in every step."""
        if self.images is not None:
            return self.images // self.batch
        # Of a whole batch, as the meter counts it: the rows of an expert's capacity are rounded up once a batch.
        return (self.flops or 0) // count(self.model, batch=self.batch).train

    @property
    def flow(self) -> Objective:
        """The objective that is trained."""
        return RectifiedFlow(prediction=self.prediction) if self.objective is None else self.objective

    @property
    def schedule(self) -> Schedule:
        """The learning rate's course over the steps."""
        # 0.07 of 100 steps is 7, where floats make 7.000000000000001 of it.
        warmup, decay = (
            math.ceil(share * self.steps * (1 - 1e-12)) for share in (self.warmup_fraction, self.decay_fraction)
        )
        warmup = min(self.steps, warmup)
        decay = min(self.steps - warmup, decay)
        return Schedule(self.steps, warmup, decay, self.decay_shape)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The averages of the weights that training keeps; the first is evaluated."""
        if self.ema == "power":
            if not self.ema_widths:
                raise InputError("ema_widths: expected at least one relative width, got none")
            return tuple(Profile("power", width) for width in self.ema_widths)
        return (Profile(self.ema, self.ema_decay if self.ema == "fixed" else self.ema_share),)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        objective = None if self.objective is None else self.objective.to_dict()
        return values | {"model": self.model.to_dict(), "objective": objective, "ema_widths": list(self.ema_widths)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_dict`; unknown fields raise InputError."""
        if not isinstance(values, Mapping):
            raise InputError(f"training: expected a table of fields, got {values!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"training.{unknown[0]}: no such field (fields: {', '.join(sorted(known))})")
        if "model" not in values:
            raise InputError("training: expected a [model] table, got none")
        model = values["model"]
        model = model if isinstance(model, DiTConfig) else DiTConfig.from_table(model)
        objective = values.get("objective")
        if isinstance(objective, Mapping):
            objective = objective_from_dict(objective)
        elif objective is not None and not isinstance(objective, Objective):
            raise InputError(f"objective: expected a table with its name, got {objective!r}")
        return cls(**{**values, "model": model, "objective": objective})

    @property
    def run_id(self) -> str:
        """A readable name that ends in a hash of all that decides the result.

        Only what differs from the defaults enters the hash, of the model's fields too. So a field that a later version
        adds leaves the names of all runs as they are; in return a default, once released, keeps its meaning.
        """
        text = json.dumps(_changed(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:10]
        return f"d{self.model.width}-l{self.model.depth}-{digest}"


def _is_number(value: Any) -> bool:
    return is_number(value) and abs(value) < 2**63  # as torch's numbers


def _changed(config: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, as JSON values."""
    values = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    changed = {name: value for name, (value, default) in values.items() if value != default}
    for name, value in changed.items():
        if isinstance(value, Objective):
            changed[name] = {"name": value.name} | _changed(value)
        elif dataclasses.is_dataclass(value):
            changed[name] = _changed(value)
    return changed
