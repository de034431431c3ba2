"""A model's weights in one file: safetensors, with its configuration and its objective in the header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

import ditscale
from ditscale.dit.config import DiTConfig
from ditscale.dit.files import write_atomically
from ditscale.dit.model import DiT
from ditscale.dit.objective import Objective, objective_from_dict
from ditscale.errors import InputError


def save_weights(path: Path, tensors: Mapping[str, Tensor], config: DiTConfig, flow: Objective) -> None:
    """Write a model's weights as safetensors, with its configuration and its objective in the header."""

    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    content = {"version": ditscale.__version__, "config": config.to_dict(), "flow": flow.to_dict()}
    # One entry: the order of several is left to chance, and equal weights should be equal files.
    header = {"ditscale": json.dumps(content)}
    write_atomically(path, safetensors.torch.save(tensors, metadata=header))


def load_weights(path: str | Path) -> tuple[DiT, Objective]:
    """Build the model that :func:`save_weights` wrote, and the objective that it was trained with.

    Raises:
        InputError: no such file, or it is damaged or no weights of ours.
    """

    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            content = json.loads((file.metadata() or {})["ditscale"])
            config, flow = DiTConfig.from_dict(content["config"]), objective_from_dict(content["flow"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        model = DiT(config)
        missing, unexpected = model.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if name != "pos_embed"]
        if missing or unexpected:
            raise KeyError(f"tensors {(missing + unexpected)[:3]} missing or unexpected")
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        raise InputError(f"{path}: expected weights written by ditscale, got {error}") from error
    return model, flow
