"""The ledger against torch on random models of every variant: per module, in total, elementwise work
included.

Each configuration is built as plain torch modules on the meta device (``flops_variants.py``) and run once,
forward and backward. Sizes go down to one token, one head, one channel, one expert; widths are odd as often
as not.
"""

from __future__ import annotations

import functools
import importlib
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from flops_measuring import Measured, hardware_of_repeated_blocks, inputs_of, measure
from flops_mutants import mutants
from model_variants import VARIANTS, config_of

from ditscale.dit import DiTConfig
from ditscale.dit.flops import FlopReport, count
from ditscale.errors import InputError

CONFIGURATIONS = 1000
CHUNK = 100
FIRST = 400  # tell every mutation of a formula from the truth (below); the others are slow tests


class Case:
    """A random configuration and how it is run; the same for the same number, everywhere."""

    def __init__(self, number: int) -> None:
        self.rng = random.Random(f"ledger {number}")
        while True:
            try:
                self.config = DiTConfig(**self.fields())
                break
            except InputError:  # fields that do not go together
                continue
        draw = self.rng.random
        self.batch = self.rng.choice((1, 1, 2, 3))
        self.lengths = self.contexts = None
        config = self.config
        if config.attention == "full" and draw() < 0.2:
            self.lengths = [self.rng.choice((1, 2, 5)) for _ in range(self.rng.choice((1, 2, 2, 3)))]
            if config.condition == "caption" and config.context != "pooled":
                self.contexts = [self.rng.choice((1, 2, 4)) for _ in self.lengths]
        self.convolution = self.lengths is None and draw() < 0.3
        self.repeat_blocks = draw() < 0.15

    def fields(self) -> dict[str, Any]:
        rng = self.rng
        pick = rng.choice
        heads, head_width = pick((1, 1, 2, 3, 4)), pick((1, 2, 3, 4, 5, 8))
        condition = pick(("class", "caption", "caption", "none"))
        context = pick(("pooled", "pooled", "in-context", "cross-attention", "joint"))
        modulation = pick(("adaln-zero", "adaln", "adaln-single", "none"))
        patch = pick((1, 2))
        depth, rare = pick((1, 1, 1, 1, 2, 2, 3)), rng.random() < 0.25
        fields = {
            "image_size": patch * pick((1, 2, 3)),
            "image_width": pick((None, None, patch, 2 * patch)),
            "latent_factor": 1,
            "patch": patch,
            "in_channels": pick((1, 2, 4)),
            "width": heads * head_width,
            "depth": depth,
            "heads": heads,
            "kv_heads": pick((None, None, 1, heads)),
            "mlp_hidden": pick((1, 3, 8)),
            "condition": condition,
            "num_classes": pick((1, 5)),
            "vocabulary_size": pick((0, 1, 7)) if context != "pooled" else 7,
            "caption_width": pick((1, 5)),
            "caption_tokens": pick((1, 2, 4)),
            "caption_layers": pick((1, 2)),
            "learn_sigma": pick((True, False)),
            "frequency_width": pick((2, 6)),
            "modulation": "adaln-zero" if context == "joint" else modulation,
            "context": context,
            "pooled_width": pick((0, 0, 3)) if modulation != "none" else 0,
            "guidance_embed": pick((True, False, False)) if modulation != "none" else False,
            "single_depth": pick((0, 1, 2)) if context == "joint" else 0,
            "mlp": pick(("gelu", "swiglu")),
            "norm": pick(("layer", "layer", "rms")),
            "qk_norm": pick(("none", "none", "head", "width")),
            "positions": pick(("sincos", "learned", "none")),
            "rope": pick((True, False, False)),
            "cross_norm": pick((True, False)),
            "frames": pick((1, 1, 2, 4)),
            "patch_frames": pick((1, 1, 2)),
            "attention": pick(("full", "full", "space-time", "alternating")),
        }
        if context != "joint" and rng.random() < 0.3:
            experts = pick((1, 2, 3, 5))
            fields |= {
                "experts": experts,
                "experts_per_token": pick(range(1, experts + 1)),
                "expert_capacity": pick((None, 0.3, 1.0, 1.7)),
                "shared_experts": pick((0, 0, 1, 2)),
                "moe_every": pick((1, 2)),
            }
        if rare and context != "joint":
            fields |= {"token_keep": [pick((0.2, 0.5, 1.0)) for _ in range(depth)], "attention": "full"}
        return fields

    def count(self, module: Any = None, **options: Any) -> FlopReport:
        function = count if module is None else module.count
        batch = 1 if self.lengths else self.batch
        again = "block" if self.repeat_blocks else "none"
        return function(
            self.config,
            batch=batch,
            lengths=self.lengths,
            context_lengths=self.contexts,
            recompute=again,
            **options,
        )

    def __repr__(self) -> str:
        plain = DiTConfig()
        changed = {k: v for k, v in self.config.to_dict().items() if v != getattr(plain, k)}
        return f"{changed} batch={self.batch} lengths={self.lengths} {self.contexts} repeat={self.repeat_blocks}"


@functools.cache
def case(number: int) -> Case:
    return Case(number)


@functools.cache
def measured(number: int) -> Measured:
    it = case(number)
    inputs = inputs_of(it.config, it.batch, it.lengths, it.contexts)
    return measure(it.config, inputs, convolution=it.convolution, repeat_blocks=it.repeat_blocks)


def differences(number: int, module: Any = None) -> list[str]:
    """What the ledger says otherwise than torch; nothing, if all is well."""
    it, torch_says = case(number), measured(number)
    report, everything = it.count(module), it.count(module, convention="all", fused=False)
    found = []

    def compare(name: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            found.append(f"{name}: ledger {ours}, torch {theirs}")

    compare("total", (report.forward, report.backward + report.recompute), torch_says.total)
    for line in report.ledger:
        theirs = torch_says.modules.get(line.name, (0, 0))
        compare(line.name, (line.forward, line.backward + line.recompute), theirs)
    compare("all", (everything.forward, everything.backward + everything.recompute), torch_says.everything)
    compare("parameters", report.params, torch_says.params)
    return found


CHUNKS = [pytest.param(n, marks=[] if n < FIRST else pytest.mark.slow) for n in range(0, CONFIGURATIONS, CHUNK)]


@pytest.mark.parametrize("start", CHUNKS)
def test_random_configurations(start: int) -> None:
    wrong = {n: found for n in range(start, start + CHUNK) if (found := differences(n))}
    first = next(iter(wrong), None)
    assert not wrong, f"{len(wrong)} of {CHUNK} differ, first {first}: {case(first)}\n" + "\n".join(wrong[first])


@pytest.mark.parametrize(("count", "often"), [(FIRST, 20), (CONFIGURATIONS, 60)])
def test_every_variant_occurs(count: int, often: int) -> None:
    """The draw is worth little if a variant hardly comes up."""
    cases = [case(n) for n in range(count)]
    configs = [it.config for it in cases]
    for field, values in {
        "modulation": ("adaln-zero", "adaln", "adaln-single", "none"),
        "context": ("pooled", "in-context", "cross-attention", "joint"),
        "condition": ("class", "caption", "none"),
        "attention": ("full", "space-time", "alternating"),
        "qk_norm": ("none", "head", "width"),
        "mlp": ("gelu", "swiglu"),
        "norm": ("layer", "rms"),
        "positions": ("sincos", "learned", "none"),
    }.items():
        for value in values:
            assert sum(getattr(c, field) == value for c in configs) >= often, (field, value)
    assert sum(c.experts > 0 for c in configs) >= often
    assert sum(c.expert_capacity is not None for c in configs) >= often
    assert sum(any(s < 1 for s in c.token_keep) for c in configs) >= often
    assert sum(c.single_depth > 0 for c in configs) >= often
    assert sum(c.kv_heads not in (None, c.heads) for c in configs) >= often
    assert sum(c.tokens == 1 for c in configs) >= often
    assert sum(c.width % 2 for c in configs) >= often
    assert sum(it.lengths is not None for it in cases) >= often
    assert sum(it.repeat_blocks for it in cases) >= often


def test_hardware_counts_what_fused_attention_repeats() -> None:
    """Torch's own formula for its fused attention charges the scores again in the backward pass; with
    checkpoints too.
    """
    for number in range(60):
        it = case(number)
        if it.repeat_blocks and it.config.modulation in ("adaln", "none"):
            continue  # a fused operator is repeated whole even where it comes last
        inputs = inputs_of(it.config, it.batch, it.lengths, it.contexts)
        theirs = measure(it.config, inputs, flash=True, repeat_blocks=it.repeat_blocks).total
        ours = it.count(convention="hardware")
        assert (ours.forward, ours.backward + ours.recompute) == theirs, it
        assert ours.train == sum(theirs)


def test_quick_shapes_change_nothing() -> None:
    """Torch's counter, in front of everything and over torch's own meta kernels, sees what it sees behind the stand-ins."""
    for number in range(0, FIRST, 16):
        it = case(number)
        inputs = inputs_of(it.config, it.batch, it.lengths, it.contexts)
        options = {"convolution": it.convolution, "repeat_blocks": it.repeat_blocks}
        slowly, quickly = measure(it.config, inputs, quick=False, **options), measured(number)
        for field in ("total", "modules", "everything", "params"):  # the counter takes some apart: other names, one sum
            assert getattr(slowly, field) == getattr(quickly, field), field


# What the operators of ditscale.kernels cost, bytes and repeated work are held to account in
# test_flops_kernels.py, norms and published rules in test_flops_published.py, the table of elementwise costs
# in test_flops_docs.py; the rest is text.
ELSEWHERE = frozenset(
    {
        "operator",
        "softmax",
        "again",
        "repeated",
        "kernel_repeats",
        "norm_elements",
        "PER_OUTPUT",
        "PER_INPUT",
        "PER_SOURCE",
    }
    | {
        "numbers",
        "moved",
        "with_bias",
        "moved_back",
        "read",
        "written",
        "bytes_forward",
        "bytes_backward",
        "size",
    }
    | {"formula", "letter", "_chosen"}
)
# Changes that change nothing: defaults that every caller overrides, a loop whose extra rounds are counted
# once.
EQUIVALENT = (
    "@dataclass(frozen=True)",
    "frames: int = 1",
    "self._last_residual = 0",
    "numbers: int = 0",
    "bytes_forward: int = 0",
    "bytes_backward: int = 0",
    'for i in range(c.depth if c.token_keep or c.experts or c.attention == "alternating" else 1):',
    "any(share < 1 for share in c.token_keep)",
    "return tokens if share == 1 else max(1, int(share * tokens))",
)


def survivors(modules: list[str], numbers: range) -> list[str]:
    """Mutations of these modules that no measured configuration tells from the truth."""
    flops = importlib.import_module("ditscale.dit.flops")
    truth = flops.Walk, flops.Workload
    alive = []
    for name in modules:
        for what, mutant in mutants(importlib.import_module(f"ditscale.dit.{name}"), ELSEWHERE):
            walker = rebuilt(name, mutant)
            flops.Walk, flops.Workload = walker.Walk, walker.Workload
            try:
                caught = any(notices(n) for n in numbers) or any(notices_repeats(variant) for variant in VARIANTS)
            finally:
                flops.Walk, flops.Workload = truth
            if not caught and not any(fragment in what for fragment in EQUIVALENT):
                alive.append(f"{name}: {what}")
    return alive


def notices(number: int) -> bool:
    try:
        return bool(differences(number))
    except Exception:  # a crash is noticed too
        return True


def notices_repeats(name: str) -> bool:
    """Of the blocks of our own model, whose last branch is the next one's."""
    try:
        report = count(config_of(name), batch=2, convention="hardware", recompute="fused-block")
        return report.train != hardware_of_repeated_blocks(name)
    except Exception:
        return True


def rebuilt(name: str, mutant: types.ModuleType) -> types.ModuleType:
    """The walk, made anew on top of a mutated module."""
    package = sys.modules["ditscale.dit"]
    replaced = {name: mutant}
    before = {n: sys.modules[f"ditscale.dit.{n}"] for n in (name, "parts", "counting")}

    def put(modules: dict[str, types.ModuleType]) -> None:
        for n, module in modules.items():
            sys.modules[f"ditscale.dit.{n}"] = module
            setattr(package, n, module)

    try:
        put(replaced)
        for n in ("parts", "counting"):
            if n not in replaced:
                fresh = types.ModuleType(before[n].__name__)
                sys.modules[fresh.__name__] = fresh  # dataclasses look their module up
                source = Path(str(before[n].__file__)).read_text(encoding="utf-8")
                exec(compile(source, str(before[n].__file__), "exec"), fresh.__dict__)
                replaced[n] = fresh
                put({n: fresh})
    finally:
        put(before)
    return replaced["counting"]


@pytest.mark.parametrize("modules", [["counting"], ["parts"], ["sheet"], ["elementwise"]], ids=lambda names: names[0])
def test_a_mutation_of_any_formula_is_noticed(modules: list[str]) -> None:
    numbers = range(FIRST)
    assert not any(differences(n) for n in numbers), "a ledger that is wrong as it stands notices nothing"
    assert not any(notices_repeats(variant) for variant in VARIANTS)
    alive = survivors(modules, numbers)
    assert not alive, "\n".join(alive)
