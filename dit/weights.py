"""A model's weights in one file: safetensors, with its configuration and its objective in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
from torch import Tensor

import ditscale
from ditscale.dit.config import DiTConfig
from ditscale.dit.files import write_atomically
from ditscale.dit.model import DiT
from ditscale.dit.objective import Objective, objective_from_dict
from ditscale.errors import InputError

if TYPE_CHECKING:
    from ditscale.dit.rundata import RunData

_ENTRY = "ditscale"


def save_weights(
    path: Path, tensors: Mapping[str, Tensor], config: DiTConfig, flow: Objective, data: RunData | None = None
) -> None:
    """Write a model's weights as safetensors, with its configuration and its objective in the header.

    ``data``: what its run knows of its data, for a file that leaves the run's folder. Default: None.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    content = {"version": ditscale.__version__, "config": config.to_dict(), "flow": flow.to_dict()}
    if data is not None:
        content["data"] = data.to_dict()
    # One entry: the order of several is left to chance, and equal weights should be equal files.
    header = {_ENTRY: json.dumps(content)}
    write_atomically(path, safetensors.torch.save(tensors, metadata=header))


def load_weights(path: str | Path) -> tuple[DiT, Objective]:
    """Build the model that :func:`save_weights` wrote, and the objective that it was trained with.

    Raises:
        InputError: no such file, or it is damaged or no weights of ours.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            header = (file.metadata() or {}).get(_ENTRY)
            if header is None:
                raise ValueError("a safetensors file whose header tells no model")
            content = json.loads(header)
            config, flow = DiTConfig.from_dict(content["config"]), objective_from_dict(content["flow"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        model = DiT(config)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if name != "pos_embed"]
        if missing or unexpected:
            raise ValueError(f"tensors {(missing + unexpected)[:3]} missing or unexpected")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: expected weights written by ditscale, got {error}") from error
    return model, flow


def read_data(path: Path) -> Any:
    """What a weights file's header tells of the training data, as :func:`save_weights` was given it; None where nothing.

    Raises:
        InputError: the file is no safetensors file, or its header is damaged.
    """
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return json.loads((file.metadata() or {}).get(_ENTRY, "{}")).get("data")
    except (OSError, AttributeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: expected weights written by ditscale, got {error}") from error
