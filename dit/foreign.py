"""Checkpoints of other projects: the released DiT and SiT, and diffusers' ``DiTTransformer2DModel``, in and out.

Only tensors are ever read: safetensors, or ``torch.load`` with ``weights_only``, where the one class that is let in besides
tensors is ``argparse.Namespace``, which the released training scripts store and which runs no code.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ditscale.dit.checks import need_choice, need_whole
from ditscale.dit.config import DiTConfig
from ditscale.dit.diffusers_names import from_diffusers, to_diffusers
from ditscale.dit.diffusion import DDPM
from ditscale.dit.embed import position_table
from ditscale.dit.files import read_json, write_atomically, write_json
from ditscale.dit.flow import RectifiedFlow
from ditscale.dit.model import DiT
from ditscale.dit.objective import Objective, objective_from_dict
from ditscale.dit.presets import preset_table
from ditscale.errors import InputError

Layout = Literal["dit", "sit", "diffusers"]
LAYOUTS: tuple[Layout, ...] = ("dit", "sit", "diffusers")
_DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
# The objective of an exported model: in a safetensors header, and in diffusers' configuration, whose private entries it skips.
_ENTRY = "ditscale_objective"


def _what(error: Exception) -> str:
    """What was wrong with a file, in one line and without torch's advice to trust it."""
    said = str(error)
    if isinstance(error, (OSError, safetensors.SafetensorError)):
        return said.splitlines()[0] if said else type(error).__name__
    other = re.search(r"GLOBAL (\S+)", said)
    return f"an object of {other[1]}" if other else f"what torch cannot read ({type(error).__name__})"


def _is_safetensors(path: Path) -> bool:
    """By its name, or by its beginning: an export may have any name. OSError where it cannot be read."""
    if path.suffix == ".safetensors":
        return True
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"  # behind the length of its header; a pickle or zip file has none there


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, whatever its name, or of a ``.pt`` file, by name, on the CPU.

    Of a training checkpoint ``{"model": ..., "ema": ..., "opt": ..., "args": ...}`` the averaged weights are taken where
    there are some.

    Raises:
        InputError: no such file, or it is damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    try:
        if _is_safetensors(path):
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a stranger's file may break its reader anywhere
        raise InputError(f"{path}: expected a file of tensors and plain values, got {_what(error)}") from error
    if isinstance(content, Mapping):
        for part in ("ema", "model"):
            if isinstance(content.get(part), Mapping):
                content = content[part]
                break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"{path}: expected tensors by name, got {type(content).__name__}")
    sparse = [name for name, value in content.items() if value.layout is not torch.strided]
    if sparse:
        raise InputError(f"{path}: {sparse[0]}: expected a dense tensor, got {content[sparse[0]].layout}")
    # Weights that went through torch.compile or DDP have a prefix.
    return {re.sub(r"^(_orig_mod\.|module\.)+", "", str(name)): tensor for name, tensor in content.items()}


def load_foreign(
    path: str | Path,
    layout: Layout,
    *,
    heads: int | None = None,
    num_classes: int | None = None,
    latent_factor: int | None = None,
) -> tuple[DiT, Objective]:
    """Build the model of another project's checkpoint, and the objective that it was trained with.

    Args:
        path: a file of the released DiT or SiT ("dit", "sit"), or a folder or file of diffusers ("diffusers").
        layout: which of them.
        heads: attention heads, which no tensor tells. Default: those of the published model of that width and depth, or
            of diffusers' configuration.
        num_classes: labels. Default: one less than the table's rows, the last being "no label"; give it for a model that
            was trained without one, which then gets a last row of zeros.
        latent_factor: pixels on a side of a latent cell. Default: 1 for 3 channels, else 8.

    Returns:
        (the model in float32, the objective that :func:`save_released` or :func:`save_diffusers` wrote beside it; else DDPM,
        with a learned variance where the model has one, or the released SiT's rectified flow).

    Raises:
        InputError: the file cannot be read, or its tensors are not those of such a model; names the first that is not.
    """
    need_choice("layout", layout, LAYOUTS)
    if layout == "diffusers":
        tensors, heads, told = _read_diffusers(Path(path), heads)
    else:
        tensors, told = read_tensors(path), _header(Path(path)).get(_ENTRY)
    config = infer_config(tensors, heads=heads, num_classes=num_classes, latent_factor=latent_factor, source=str(path))
    table = tensors["y_embedder.embedding_table.weight"]
    if len(table) == config.num_classes:
        tensors["y_embedder.embedding_table.weight"] = torch.cat([table, torch.zeros_like(table[:1])])
    model = DiT(config)
    model.load_state_dict(tensors)
    objective: Objective = RectifiedFlow(network="sit") if layout == "sit" else DDPM(learn_sigma=config.learn_sigma)
    if told is not None:
        objective = _told_objective(told, str(path))
        objective.check_model(config)
    return model, objective


def _header(path: Path) -> dict[str, str]:
    """The entries of a safetensors file's header; none for another file."""
    if not _is_safetensors(path):
        return {}
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _told_objective(text: Any, source: str) -> Objective:
    """An objective as it is written beside exported tensors."""
    try:
        return objective_from_dict(json.loads(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{source}: {_ENTRY}: expected an objective as ditscale writes it, got {error}") from error


# The tensors that tell a configuration, and their dimensions.
_AXES = {
    "x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2, "blocks.0.mlp.fc1.weight": 2,
    "t_embedder.mlp.0.weight": 2, "final_layer.linear.weight": 2,
}  # fmt: skip


def infer_config(
    tensors: Mapping[str, Tensor],
    *,
    heads: int | None = None,
    num_classes: int | None = None,
    latent_factor: int | None = None,
    source: str = "tensors",
) -> DiTConfig:
    """The configuration of a released DiT or SiT from its tensors' names and shapes, every one of which must fit.

    Arguments and errors as :func:`load_foreign`.
    """
    for name, axes in _AXES.items():
        if name not in tensors or tensors[name].ndim != axes:
            raise InputError(f"{source}: expected the tensors of a released DiT, got none or another shape of {name}")
    width, in_channels, patch, _ = tensors["x_embedder.proj.weight"].shape
    tokens = tensors["pos_embed"].shape[1]
    rows = len(tensors["y_embedder.embedding_table.weight"])
    hidden = len(tensors["blocks.0.mlp.fc1.weight"])
    frequencies = tensors["t_embedder.mlp.0.weight"].shape[1]
    out = len(tensors["final_layer.linear.weight"])
    # Counted, not read off the largest number: a gap is a tensor that is missing below.
    depth = len({found.group(1) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))})
    if heads is None:
        released = (fields for name, fields in preset_table().items() if name.startswith("DiT-"))
        known = {(fields["width"], fields["depth"]): fields["heads"] for fields in released}
        if (width, depth) not in known:
            raise InputError(f"heads: expected the number for a model of width {width} and depth {depth}, got none")
        heads = known[width, depth]
    factor = latent_factor or (1 if in_channels == 3 else 8)
    config = DiTConfig(
        image_size=math.isqrt(tokens) * patch * factor,
        latent_factor=factor,
        in_channels=in_channels,
        patch=patch,
        width=width,
        depth=depth,
        heads=heads,
        mlp_hidden=None if hidden == 4 * width else hidden,
        num_classes=num_classes or rows - 1,
        learn_sigma=out == 2 * in_channels * patch**2,
        frequency_width=frequencies,
    )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()}
    if rows == config.num_classes:
        expected["y_embedder.embedding_table.weight"] = (rows, width)
    got = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            wanted = list(expected[name]) if name in expected else "no such tensor"
            raise InputError(f"{source}: {name}: expected {wanted}, got {list(got[name]) if name in got else 'none'}")
    return config


def save_released(path: str | Path, model: DiT, objective: Objective | None = None) -> None:
    """Write a class-conditional adaLN-zero model as safetensors under the released DiT's names, positions included.

    ``objective``: what it was trained with, for the header, where :func:`load_foreign` finds it. Default: None, not told.

    Raises:
        InputError: the model is of another variant, or the file cannot be written.
    """
    header = None if objective is None else {_ENTRY: json.dumps(objective.to_dict())}
    write_atomically(Path(path), safetensors.torch.save(_released_state(model), metadata=header))


def save_diffusers(folder: str | Path, model: DiT, objective: Objective | None = None) -> None:
    """Write a class-conditional adaLN-zero model as a folder that ``DiTTransformer2DModel.from_pretrained`` reads.

    Diffusers spreads the frequencies of the time over ``i / (half - 1)`` where the released model has ``i / half``, and has
    no setting for it: set ``time_proj.downscale_freq_shift = 0`` in every block to get the released model's outputs.
    ``objective`` as for :func:`save_released`, in ``config.json``.

    Raises:
        InputError: the model is of another variant, or the folder cannot be written.
    """
    state, config, folder = _released_state(model), model.config, Path(folder)
    if config.frequency_width != 256 or config.image_width is not None:
        raise InputError("model: expected 256 time features and square images for diffusers, got others")
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name != "pos_embed":
            tensors |= to_diffusers(name, tensor, config.depth)
    values: dict[str, Any] = {
        "_class_name": "DiTTransformer2DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config.width // config.heads,
        "in_channels": config.in_channels,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config.heads,
        "num_embeds_ada_norm": config.num_classes,
        "num_layers": config.depth,
        "out_channels": config.out_channels,
        "patch_size": config.patch,
        "sample_size": config.input_side,
    }
    if objective is not None:
        values[f"_{_ENTRY}"] = json.dumps(objective.to_dict())
    if config.mlp_width != 4 * config.width:
        raise InputError(f"mlp_ratio: expected 4 for diffusers, got {config.mlp_width / config.width:g}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: expected a folder to write to, got {error.strerror or error}") from error
    write_atomically(folder / _DIFFUSERS_WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_json(folder / "config.json", values)


# What a model must be for the released names to hold it.
_RELEASED = {
    "condition": "class", "modulation": "adaln-zero", "context": "pooled", "pooled_width": 0, "guidance_embed": False,
    "mlp": "gelu", "norm": "layer", "qk_norm": "none", "positions": "sincos", "rope": False, "experts": 0, "image_width": None,
    "frames": 1, "patch_frames": 1, "attention": "full",
}  # fmt: skip


def _released_state(model: DiT) -> dict[str, Tensor]:
    """A model's tensors under the released names; InputError where those names cannot hold it."""
    for field, value in _RELEASED.items():
        if getattr(model.config, field) != value:
            got = getattr(model.config, field)
            raise InputError(f"{field}: expected {value!r} for the released DiT's layout, got {got!r}")
    if model.config.key_heads != model.config.heads:
        raise InputError(f"kv_heads: expected none for the released DiT's layout, got {model.config.key_heads}")
    return {name: tensor.detach().float().contiguous() for name, tensor in model.state_dict().items()}


# What diffusers' configuration may say of what no tensor tells; an entry that is not there is the first. The released
# folders bear the class's older name and its default for the last layer norm, 1e-5, where the DiT was trained with 1e-6.
_DIFFUSERS = {
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_eps": (1e-6, 1e-5),
}


def _read_diffusers(path: Path, heads: int | None) -> tuple[dict[str, Tensor], int | None, Any]:
    """Tensors under the released names, with the positions that diffusers does not store; the heads; the objective, if told."""
    folder = path if path.is_dir() else path.parent
    found = folder / _DIFFUSERS_WEIGHTS if path.is_dir() else path
    if path.is_dir() and not found.exists():
        found = folder / "diffusion_pytorch_model.bin"
    source, values = folder / "config.json", read_json(folder / "config.json")
    if not isinstance(values, Mapping):
        raise InputError(f"{source}: expected a DiTTransformer2DModel's entries, got {type(values).__name__}")
    for field, known in _DIFFUSERS.items():
        if values.get(field, known[0]) not in known:
            raise InputError(f"{source}: {field}: expected {known[0]}, got {values[field]!r}")
    for field in ("sample_size", "patch_size", "num_attention_heads", "attention_head_dim"):
        need_whole(f"{source}: {field}", values.get(field), 1)
    tensors = from_diffusers(read_tensors(found))
    side = values["sample_size"] // values["patch_size"]
    width = values["num_attention_heads"] * values["attention_head_dim"]
    tensors["pos_embed"] = position_table(width, (1, side, side)).unsqueeze(0)
    return tensors, heads or values["num_attention_heads"], values.get(f"_{_ENTRY}")
