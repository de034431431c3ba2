"""The ledger against torch's own counter, on the very model that ditscale trains: per layer and in total."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ditscale.dit import DiT, DiTConfig
from ditscale.dit.attribution import ModuleAttribution
from ditscale.dit.flops import count
from ditscale.errors import InputError

# From the model's module names to the ledger's lines; the feed-forward's first layer is called without its
# module.
MODULES = {
    "x_embedder": ("patch_embed",),
    "t_embedder.mlp.0": ("time_mlp.0",),
    "t_embedder.mlp.2": ("time_mlp.2",),
    "y_embedder.proj": ("caption.proj",),
    "blocks.adaLN_modulation": ("blocks.modulation",),
    "blocks.attn.qkv": ("blocks.attn.qkv",),
    "blocks.attn": ("blocks.attn.qkv", "blocks.attn.scores", "blocks.attn.values", "blocks.attn.proj"),
    "blocks.attn.proj": ("blocks.attn.proj",),
    "blocks.mlp": ("blocks.mlp.fc1", "blocks.mlp.fc2"),
    "blocks.mlp.fc2": ("blocks.mlp.fc2",),
    "final_layer.adaLN_modulation": ("final.modulation",),
    "final_layer.linear": ("final.linear",),
}
SMALL = {"image_size": 8, "latent_factor": 1, "width": 8, "depth": 2, "heads": 2, "num_classes": 3}
CASES = {
    "class": ({}, 2),
    "caption": ({"condition": "caption", "vocabulary_size": 7, "caption_width": 5}, 3),
    "unconditional": ({"condition": "none"}, 2),
    "mean only": ({"learn_sigma": False, "in_channels": 3}, 1),
    "one token": ({"patch": 8}, 1),  # attention of a single token to itself
    "one head, one block": ({"heads": 1, "depth": 1}, 1),
    "head width 1": ({"heads": 8}, 2),
    "width 12, 3 heads": ({"width": 12, "heads": 3}, 2),  # nothing here is a power of two
    "mlp 1 unit": ({"mlp_ratio": 0.125}, 2),
    "mlp 2.7": ({"mlp_ratio": 2.7, "frequency_width": 6}, 2),
    "muP": ({"mup_base_width": 4}, 2),
}


def traced(config: DiTConfig, batch: int) -> tuple[dict[str, int], dict[str, int]]:
    """FLOPs of forward and of backward by module, block numbers struck out, as torch's counter sees them on
    meta.
    """
    with torch.device("meta"):
        model = DiT(config)
        x = torch.empty(batch, config.in_channels, config.input_side, config.input_side)
        t = torch.empty(batch)
        y = {
            "class": torch.empty(batch, dtype=torch.int64),
            "caption": torch.empty(batch, 4, dtype=torch.int64),
        }
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = ModuleAttribution(model)
    with counter:
        out = model(x, t, y.get(config.condition))
        forward = by_module(counter)
        out.sum().backward()
    both = by_module(counter)
    return forward, {name: flops - forward.get(name, 0) for name, flops in both.items()}


def by_module(counter: FlopCounterMode) -> dict[str, int]:
    sums: dict[str, int] = {}
    for module, counts in counter.get_flop_counts().items():
        name = re.sub(r"^blocks\.\d+", "blocks", module)
        sums[name] = sums.get(name, 0) + sum(counts.values())
    return sums


@pytest.mark.parametrize("case", CASES)
def test_equal_to_torch_counter(case: str) -> None:
    changes, batch = CASES[case]
    config = DiTConfig(**{**SMALL, **changes})
    report = count(config, batch=batch)
    forward, backward = traced(config, batch)
    assert (report.forward, report.backward) == (forward["Global"], backward["Global"])
    lines = {line.name: line for line in report.ledger}
    for module, names in MODULES.items():
        mine = [lines[name] for name in names if name in lines]
        assert sum(line.forward for line in mine) == forward.get(module, 0), module
        assert sum(line.backward for line in mine) == backward.get(module, 0), module
    assert {name for names in MODULES.values() for name in names} >= lines.keys()


@pytest.mark.parametrize("case", CASES)
def test_parameters_equal_to_the_model(case: str) -> None:
    config = DiTConfig(**{**SMALL, **CASES[case][0]})
    with torch.device("meta"):
        model = DiT(config)
    params = count(config).params
    assert params.total == sum(p.numel() for p in model.parameters())
    assert params.total == params.per_token + params.per_sample + params.embedding


def test_dit_xl_2_to_the_last_integer() -> None:
    report = count(DiTConfig.preset("DiT-XL/2"), image_size=256)
    assert report.forward == 237_242_843_136
    assert report.train == 711_718_502_400
    # The released checkpoint holds 294,912 more: its fixed position table.
    assert report.params.total == 675_129_632 - 294_912


def test_image_size_and_batch_reach_the_count() -> None:
    config = DiTConfig(**SMALL)
    large = count(config.replace(image_size=16), batch=3)
    assert count(config, image_size=16, batch=3) == large
    assert large.train == 3 * count(config, image_size=16).train


@pytest.mark.parametrize("arguments", [{"image_size": -1}, {"image_size": 255}, {"batch": 0}, {"batch": 1.5}])
def test_impossible_input_is_named(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(arguments))):
        count(DiTConfig(), **arguments)


def test_counts_without_torch() -> None:
    code = (
        "import sys; from ditscale.dit.flops import count; from ditscale.dit.config import DiTConfig\n"
        "count(DiTConfig.preset('DiT-B/4')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_json_is_plain() -> None:
    report = count(DiTConfig.preset("DiT-S/8"))
    content = json.loads(json.dumps(report.to_json()))
    assert content["forward_flops"] == report.forward == sum(line["forward"] for line in content["ledger"])
    assert content["convention"] == "matmul"
