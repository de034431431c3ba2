"""Checkpoints of several ranks, through torch's distributed checkpointing: each rank writes its shards as safetensors, any
number of ranks reads them.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from ditscale.dit.checkpoint import begin_checkpoint, discard_checkpoint, end_checkpoint
from ditscale.dit.files import file_sha256
from ditscale.dit.training.ranks import Ranks
from ditscale.errors import InputError


def save_shards(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], ranks: Ranks) -> None:
    """Write a checkpoint of all ranks together.

    Raises:
        InputError: a rank cannot write; the checkpoints before are as they were.
    """
    directory = ranks.on_first(lambda: begin_checkpoint(folder, step))
    try:
        sha256 = _write(directory, tensors, ranks)
        ranks.on_first(lambda: end_checkpoint(folder, step, sha256, state))
    except InputError:
        ranks.on_first(lambda: discard_checkpoint(folder, step))
        raise


def _write(directory: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Every rank's shards; the checksum of each file."""
    try:
        with _quiet():
            save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))
    except CheckpointException as error:
        reasons = sorted({str(failure[0]) for failure in error.failures.values()})
        raise InputError(f"{directory}: expected a place to write, got {reasons[0]}") from error
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    # The checksums are shared out like the shards were.
    mine: dict[str, str] | str
    try:
        mine = {name: file_sha256(directory / name) for name in files[ranks.rank :: ranks.count]}
    except OSError as error:  # said to all ranks, or the others would wait for this one
        mine = f"{directory}: expected files that can be read again, got {error}"
    found: dict[str, str] = {}
    for part in ranks.gather(mine):
        if isinstance(part, str):
            raise InputError(part)
        found |= part
    return found


def load_shards(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill live tensors, whole or sharded in any way, from a checkpoint of any number of ranks.

    Raises:
        InputError: the checkpoint lacks a tensor, or one has another shape.
    """
    try:
        with _quiet():
            load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)))
    except CheckpointException as error:
        reasons = sorted({str(failure[0]) for failure in error.failures.values()})
        raise InputError(f"{directory}: {reasons[0]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks that there is no process group, or that a sharded checkpoint is not consolidated."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            yield
    finally:
        logger.setLevel(before)
