"""Train a DiT: from a configuration to a finished, replayable run record, through any number of interruptions.

Every random number follows from the seed and the step, not from what was drawn before, so a run that was killed and
resumed ends with the same bits as one that was not (same machine, versions and number of threads).
"""

from __future__ import annotations

from ditscale.dit.training.averages import reconstruct
from ditscale.dit.training.batches import batch_tensors, open_stream, validation_set
from ditscale.dit.training.config import TrainConfig
from ditscale.dit.training.evaluation import picture_settings
from ditscale.dit.training.execution import Execution
from ditscale.dit.training.loop import Stopped, train
from ditscale.dit.training.record import RunRecord, check_record, versions
from ditscale.dit.training.replay import replay_step

__all__ = [
    "Execution",
    "RunRecord",
    "Stopped",
    "TrainConfig",
    "batch_tensors",
    "check_record",
    "open_stream",
    "picture_settings",
    "reconstruct",
    "replay_step",
    "train",
    "validation_set",
    "versions",
]
