"""How a run is carried out: on what, split how, and what it tells on the way.

Nothing here changes what is trained, but for how a mixture of experts' batch is split; see :class:`Execution`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ditscale.dit.checks import need_whole
from ditscale.errors import InputError

PARALLEL = ("auto", "ddp", "fsdp", "hsdp")
RECOMPUTE = ("none", "block")
SINKS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a run is carried out. Two executions of one configuration differ by rounding, one and the same by nothing.

    Mixtures of experts are the exception. Their balance loss, where ``balance_weight`` is above 0, and the rows of an
    ``expert_capacity`` are counted over the images of one pass of one process, and neither is linear in them. So
    ``microbatch`` and the number of processes change what is trained, unless every pass holds as many images as before;
    with a capacity the number of processes also changes the validation loss.

    Args:
        device: "cpu", "cuda", or "auto": CUDA where there is one. Default: "auto".
        parallel: how several processes (of torchrun) share the work: "ddp" replicates the weights, "fsdp" shards them
            over all processes, "hsdp" shards them within groups of ``shard_ranks`` and replicates the groups; "auto" is
            "ddp". One process ignores it. Default: "auto".
        shard_ranks: processes that share one copy of the weights in "hsdp". Default: those of one machine.
        microbatch: images of one forward and backward pass of one process; a step adds up as many passes as its share
            of the batch takes. Default: the whole share.
        recompute: "none", or "block": each block's activations are computed again in the backward pass. Default: "none".
        compile: whether each block is compiled by torch.compile. Default: False.
        data_workers: processes that prepare data beside the training process; 0 prepares it between the steps.
            Default: 0.
        checkpoint_seconds: time between checkpoints. Default: 20.
        validate_every: steps between validations on the way; 0 validates at the end only. Default: 0.
        sample_every: steps between pictures drawn on the way, ``samples/step-*.png``; 0 draws none. Default: 0.
        vae: folder of a diffusers AutoencoderKL that decodes the pictures of a model of latents. Default: None.
        sinks: further places for metrics beside ``metrics.jsonl``: "tensorboard", "wandb", "trackio". Default: none.

    Raises:
        InputError: a value is not possible; names it, what was expected and what came.
    """

    device: str = "auto"
    parallel: str = "auto"
    shard_ranks: int | None = None
    microbatch: int | None = None
    recompute: str = "none"
    compile: bool = False
    data_workers: int = 0
    checkpoint_seconds: float = 20.0
    validate_every: int = 0
    sample_every: int = 0
    vae: str | None = None
    sinks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, choices in (
            ("device", ("auto", "cpu", "cuda")),
            ("parallel", PARALLEL),
            ("recompute", RECOMPUTE),
            ("compile", (False, True)),
        ):
            if getattr(self, name) not in choices:
                listed = ", ".join(str(choice).lower() for choice in choices)
                raise InputError(f"execution.{name}: expected one of {listed}, got {getattr(self, name)!r}")
        for name in ("data_workers", "validate_every", "sample_every"):
            need_whole(f"execution.{name}", getattr(self, name), 0)
        for name in ("microbatch", "shard_ranks"):
            if getattr(self, name) is not None:
                need_whole(f"execution.{name}", getattr(self, name), 1)
        seconds = self.checkpoint_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not seconds >= 0:
            raise InputError(f"execution.checkpoint_seconds: expected a number of at least 0, got {seconds!r}")
        if self.vae is not None and not isinstance(self.vae, (str, os.PathLike)):
            raise InputError(f"execution.vae: expected a folder's path, got {self.vae!r}")
        if not isinstance(self.sinks, (str, list, tuple)):
            raise InputError(f"execution.sinks: expected some of {', '.join(SINKS)}, got {self.sinks!r}")
        sinks = (self.sinks,) if isinstance(self.sinks, str) else tuple(self.sinks)
        for sink in sinks:
            if sink not in SINKS:
                raise InputError(f"execution.sinks: expected some of {', '.join(SINKS)}, got {sink!r}")
        object.__setattr__(self, "sinks", sinks)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Execution:
        """From a parsed table; unknown fields raise InputError."""
        if not isinstance(values, Mapping):
            raise InputError(f"execution: expected a table of fields, got {values!r}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InputError(f"execution.{unknown[0]}: no such field (fields: {', '.join(sorted(known))})")
        return cls(**values)
