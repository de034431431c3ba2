"""What a training loop spends: counters, ratios, budgets, resume; and the lines beside the model."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from flops_measuring import hardware_of_repeated_blocks
from model_variants import VARIANTS, config_of
from torch import Tensor, nn

from ditscale.dit import DiTConfig
from ditscale.dit.attribution import EVERYTHING, ModuleAttribution
from ditscale.dit.encoders import AUTOENCODERS, TEXT_ENCODERS, AutoencoderSpec, TextEncoderSpec
from ditscale.dit.flops import FlopMeter, compare, count, trace
from ditscale.dit.torch_costs import matmul_formulas
from ditscale.dit.tracing import Watch
from ditscale.errors import InputError

SMALL = DiTConfig(image_size=8, latent_factor=1, width=8, depth=2, heads=2, num_classes=3)
CAPTIONS = SMALL.replace(condition="caption", caption_tokens=4, context="cross-attention")


def test_counts_what_the_ledger_counts() -> None:
    meter = FlopMeter(SMALL, recompute="block", autoencoder="sd", optimizer="adamw", ema=True, clip=True)
    for batch in (3, 5):
        meter.step(batch)
    one = count(SMALL)
    assert (meter.steps, meter.samples, meter.tokens) == (2, 8, 8 * 16)
    assert meter.model_flops == 8 * one.train
    assert meter.hardware_flops == 8 * count(SMALL, convention="hardware", recompute="block").train
    assert meter.encoder_flops == 8 * AUTOENCODERS["sd"].encode(8, 8)
    assert meter.optimizer_flops == 2 * (14 + 3 + 3) * one.params.total


def test_packed_steps_count_their_own_tokens() -> None:
    meter = FlopMeter(CAPTIONS)
    meter.step(lengths=[3, 16], context_lengths=[1, 4])
    assert (meter.samples, meter.tokens) == (2, 19)
    assert meter.model_flops == count(CAPTIONS, lengths=[3, 16], context_lengths=[1, 4]).train


def test_resume_is_exact() -> None:
    """Counters far beyond 2^53, where floating point would lose steps."""
    whole = FlopMeter(SMALL, budget=1e30)
    first = FlopMeter(SMALL, budget=1e30)
    whole.model_flops = first.model_flops = (1 << 60) + 1
    for _ in range(7):
        whole.step(3, seconds=0.1)
    for _ in range(4):
        first.step(3, seconds=0.1)
    second = FlopMeter(SMALL, budget=1e30)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(3):
        second.step(3, seconds=0.1)
    assert second.state_dict() == whole.state_dict()
    assert second.steps_left(3) == whole.steps_left(3)


@pytest.mark.parametrize("earlier", [[], ["none"], ["block"]], ids=str)
def test_recomputation_may_change_on_the_way(earlier: list[str]) -> None:
    """Earlier versions wrote it into what the state says of what it counts."""
    plain, again = FlopMeter(SMALL), FlopMeter(SMALL, recompute="block")
    plain.step(2)
    again.load_state_dict(plain.state_dict() | {"counts": plain._fingerprint(earlier)})
    again.step(2)
    assert again.model_flops == 2 * plain.model_flops
    assert again.hardware_flops == plain.hardware_flops + again.cost(2).hardware > 2 * plain.hardware_flops


@pytest.mark.parametrize("damage", [{"steps": -1}, {"tokens": 1.5}, {"samples": None}, {"counts": "another"}])
def test_a_foreign_or_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    meter = FlopMeter(SMALL)
    meter.step(3)
    state = meter.state_dict() | damage
    fresh = FlopMeter(SMALL)
    with pytest.raises(InputError, match="state"):
        fresh.load_state_dict(state)
    assert fresh.steps == 0
    with pytest.raises(InputError, match="another's"):
        FlopMeter(SMALL, autoencoder="sd").load_state_dict(meter.state_dict())


def test_shares_of_a_known_peak() -> None:
    meter = FlopMeter(SMALL, recompute="block", device="NVIDIA H100 80GB HBM3", devices=4)
    meter.step(2)
    assert meter.mfu is None and meter.flops_per_second is None  # nobody said how long it took
    meter.step(2, seconds=0.25)
    assert meter.mfu == pytest.approx(2 * count(SMALL).train / (0.25 * 4 * 989.4e12), rel=1e-12)
    assert meter.hfu is not None and meter.hfu > meter.mfu
    assert meter.flops_per_second == pytest.approx(2 * count(SMALL).train / 0.25)
    for _ in range(30):
        meter.step(2, seconds=0.5)
    # Only the last steps count: a slow start is forgotten.
    assert meter.mfu == pytest.approx(2 * count(SMALL).train / (0.5 * 4 * 989.4e12), rel=1e-12)
    json.dumps(meter.summary())


def test_an_unknown_device_has_no_share() -> None:
    for device, dtype in (
        (None, "bfloat16"),
        ("Abacus 3000", "bfloat16"),
        ("NVIDIA A100-SXM4-80GB", "float8"),
    ):
        meter = FlopMeter(SMALL, device=device, dtype=dtype)
        meter.step(2, seconds=1.0)
        assert meter.mfu is None and meter.hfu is None and meter.summary()["peak"] is None


def test_budget_pays_for_whole_steps() -> None:
    each = 2 * count(SMALL).train
    meter = FlopMeter(SMALL, budget=10 * each - 1)
    assert meter.steps_left(2) == 9
    for done in range(9):
        assert meter.steps_left(2) == 9 - done
        meter.step(2)
    assert meter.steps_left(2) == 0 and meter.steps_left(1) == 1
    assert meter.spent == meter.model_flops
    everything = FlopMeter(SMALL, budget=1e12, charge="everything", ema=True, autoencoder="sd")
    everything.step(2)
    assert everything.spent == everything.hardware_flops + everything.encoder_flops + everything.optimizer_flops
    cost = everything.cost(2)
    assert everything.steps_left(2) == (10**12 - everything.spent) // (cost.hardware + cost.encoder + cost.optimizer)
    assert FlopMeter(SMALL).steps_left(2) is None


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"devices": 0}, "devices"),
        ({"budget": -3}, "budget"),
        ({"charge": "tokens"}, "charge"),
        ({"image_size": 7}, "image_size"),
    ],
)
def test_impossible_meters_are_named(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        FlopMeter(SMALL, **arguments)


@pytest.mark.parametrize(
    ("name", "flops"),
    [("adamw", 14), ("adam", 13), ("sgd", 2), ("momentum", 4)],
)
def test_optimizers_by_the_table(name: str, flops: int) -> None:
    """Torch's own update, one operation after the other, counted by the table of elementwise costs."""
    weight = nn.Parameter(torch.zeros(7, 5))
    optimizer: torch.optim.Optimizer
    if name in ("adamw", "adam"):
        optimizer = torch.optim.AdamW([weight], weight_decay=0.1 if name == "adamw" else 0.0, foreach=False)
    else:
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9 if name == "momentum" else 0.0, foreach=False)
    for _ in range(2):  # the first step of a momentum is a copy
        weight.grad = torch.ones_like(weight)
        watch = Watch(ModuleAttribution(nn.Identity()), matmul_formulas(), everything=True)
        with watch:
            optimizer.step()
    scalars = sum(watch.flops[EVERYTHING].values()) - flops * 35
    assert 0 <= scalars <= 4  # the step's own counter
    report = count(SMALL, optimizer=name)
    assert report.line(f"optimizer.{name}").forward == flops * report.params.total
    assert report.step == report.train + flops * report.params.total


def test_averaging_and_clipping_by_the_table() -> None:
    weight, average = torch.zeros(7, 5), torch.zeros(7, 5)
    watch = Watch(ModuleAttribution(nn.Identity()), matmul_formulas(), everything=True)
    with watch:
        average.lerp_(weight, 0.1)
    assert sum(watch.flops[EVERYTHING].values()) == 3 * 35
    watch = Watch(ModuleAttribution(nn.Identity()), matmul_formulas(), everything=True)
    with watch:
        weight.mul_(torch.linalg.vector_norm(weight))
    assert sum(watch.flops[EVERYTHING].values()) == 3 * 35


class Residual(nn.Module):
    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, fan_in), nn.Conv2d(fan_in, fan_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(2, fan_out), nn.Conv2d(fan_out, fan_out, 3, padding=1)
        self.shortcut = nn.Conv2d(fan_in, fan_out, 1) if fan_in != fan_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(nn.functional.silu(self.norm1(x)))
        return self.shortcut(x) + self.conv2(nn.functional.silu(self.norm2(y)))


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = Residual(width, width), Residual(width, width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = x.flatten(2).transpose(1, 2)
        y = nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return self.last(x + self.out(y).transpose(1, 2).unflatten(-1, x.shape[2:]))


def encoder(spec: AutoencoderSpec) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, spec.channels, 3, padding=1)]
    fan_in = spec.channels
    for level, multiplier in enumerate(spec.multipliers):
        for _ in range(spec.resnets):
            layers.append(Residual(fan_in, spec.channels * multiplier))
            fan_in = spec.channels * multiplier
        if level + 1 < len(spec.multipliers):
            layers.append(nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(fan_in, fan_in, 3, stride=2)))
    z = 2 * spec.latent_channels
    layers += [Middle(fan_in), nn.Conv2d(fan_in, z, 3, padding=1)]
    return nn.Sequential(*layers, *([nn.Conv2d(z, z, 1)] if spec.quantise else []))


def decoder(spec: AutoencoderSpec) -> nn.Module:
    z, fan_in = spec.latent_channels, spec.channels * spec.multipliers[-1]
    layers: list[nn.Module] = [nn.Conv2d(z, z, 1)] if spec.quantise else []
    layers += [nn.Conv2d(z, fan_in, 3, padding=1), Middle(fan_in)]
    for level in reversed(range(len(spec.multipliers))):
        fan_out = spec.channels * spec.multipliers[level]
        for _ in range(spec.resnets + 1):
            layers.append(Residual(fan_in, fan_out))
            fan_in = fan_out
        if level:
            layers.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(fan_in, fan_in, 3, padding=1)))
    return nn.Sequential(*layers, nn.Conv2d(fan_in, 3, 3, padding=1))


@pytest.mark.parametrize(
    "spec",
    [
        AutoencoderSpec(),
        AutoencoderSpec(8, (1, 3), 1, 5, quantise=False),
        AutoencoderSpec(4, (1, 2, 2), 3, 2),
    ],
)
def test_autoencoder_equals_torch(spec: AutoencoderSpec) -> None:
    with torch.device("meta"):
        ahead, back = encoder(spec), decoder(spec)
        image, latent = (
            torch.empty(1, 3, 32, 48),
            torch.empty(1, spec.latent_channels, 32 // spec.factor, 48 // spec.factor),
        )
    assert trace(ahead, image, backward=False).forward == spec.encode(32, 48)
    assert trace(back, latent, backward=False).forward == spec.decode(32, 48)
    with pytest.raises(InputError, match="multiple"):
        spec.encode(32, 49)


@pytest.mark.parametrize(
    "spec", [TextEncoderSpec(2, 12, 3, 5, 20), TextEncoderSpec(1, 8, 2, 4, 16, gated=True, projection=6)]
)
def test_text_encoder_equals_torch(spec: TextEncoderSpec) -> None:
    inner = spec.heads * spec.head_width

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(spec.width, 3 * inner), nn.Linear(inner, spec.width)
            self.up = nn.Linear(spec.width, spec.hidden * (2 if spec.gated else 1))
            self.down = nn.Linear(spec.hidden, spec.width)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (z.unflatten(-1, (spec.heads, -1)).transpose(1, 2) for z in self.qkv(x).chunk(3, -1))
            y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            hidden = self.up(x + self.out(y))
            return self.down(hidden.chunk(2, -1)[0] if spec.gated else hidden)

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(Layer() for _ in range(spec.layers)))
            self.projection = nn.Linear(spec.width, spec.projection) if spec.projection else None

        def forward(self, x: Tensor) -> Tensor:
            y = self.layers(x)
            return y if self.projection is None else self.projection(y[:, -1])

    with torch.device("meta"):
        model, x = Encoder(), torch.empty(1, 7, spec.width)
    assert trace(model, x, backward=False).forward == spec.encode(7)


def test_encoders_stand_beside_the_model() -> None:
    report = count(CAPTIONS, batch=3, text_encoders=["clip-l", "t5-xxl"], autoencoder="sd", text_tokens=77)
    assert report.line("text_encoder.t5-xxl").forward == 3 * TEXT_ENCODERS["t5-xxl"].encode(77)
    assert report.line("autoencoder.encode").forward == 3 * AUTOENCODERS["sd"].encode(8, 8)
    assert report.train == count(CAPTIONS, batch=3).train
    assert report.step == report.train + sum(line.forward for line in report.extras)


@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_that_the_trainer_repeats_cost_what_runs(name: str) -> None:
    """Their last branch is left to the next block's fused operator: its product is not repeated."""
    report = count(config_of(name), batch=2, convention="hardware", recompute="fused-block")
    assert report.train == hardware_of_repeated_blocks(name)


def test_repeating_fused_blocks_is_counted_in_products_only() -> None:
    with pytest.raises(InputError, match="recompute: expected none, block, attention or names of lines under all"):
        count(SMALL, convention="all", recompute="fused-block")
    assert compare(SMALL, recompute="fused-block")[-1].train > 0
