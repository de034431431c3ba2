"""A step of AdamW in one pass: values against float64, its place in memory, threads, instruction sets, mistakes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from oracles import judge_draws, wide
from torch.optim.adamw import adamw

from ditscale.errors import InputError
from ditscale.kernels.adamw import cost
from ditscale.kernels.adamw.op import adamw_average_, serves

NAMES = ("weight", "first", "second", "average")
RULE_NAMES = ("step", "lr", "beta1", "beta2", "eps", "weight_decay", "clip", "decay")
RULES = {
    name: dict(zip(RULE_NAMES, numbers, strict=True))
    for name, numbers in {
        "usual": (7, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.7, 0.99),
        "first": (1, 1e-3, 0.9, 0.999, 1e-8, 0.0, 1.0, 0.1),
        "late": (10**6, 1e-4, 0.0, 0.95, 1e-3, 0.5, 1e-3, 0.0),
    }.items()
}


def inputs(count, size=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight, gradient, first, average = (torch.randn(count, generator=g) for _ in range(4))
    second = (size * torch.randn(count, generator=g)).square()
    return {"weight": weight, "gradient": size * gradient, "first": size * first, "second": second, "average": average}


def exact(given, *, step, lr, beta1, beta2, eps, weight_decay, clip, decay):
    """Float64 in numpy, as the paper writes it."""
    w, g, m, v, a = (wide(given[name]) for name in ("weight", "gradient", "first", "second", "average"))
    g = clip * g
    m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    w = w - lr * weight_decay * w - lr * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - beta2**step)) + eps)
    return dict(zip(NAMES, (w, m, v, decay * a + (1 - decay) * w), strict=True))


def by_kernel(given, rule):
    found = {name: t.clone() for name, t in given.items()}
    adamw_average_(**found, **rule)
    assert torch.equal(found.pop("gradient").nan_to_num(7.0), given["gradient"].nan_to_num(7.0))
    return found


def by_pytorch(given, rule):
    t = {name: tensor.clone() for name, tensor in given.items()}
    done = [torch.tensor(float(rule["step"] - 1))]
    numbers = {k: rule[k] for k in ("lr", "beta1", "beta2", "eps", "weight_decay")}
    lists = [[t["weight"]], [t.pop("gradient").mul_(rule["clip"])], [t["first"]], [t["second"]]]
    adamw(*lists, [], done, fused=True, amsgrad=False, maximize=False, **numbers)
    t["average"].lerp_(t["weight"], 1 - rule["decay"])
    return t


@pytest.mark.native
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_values(native, rule, size):
    results = []
    for seed in range(4):
        given = inputs(1003, size, seed)
        assert serves(*given.values())
        results.append((by_kernel(given, rule), exact(given, **rule), by_pytorch(given, rule)))
    for name in NAMES:
        judge_draws(name, [(got[name], want[name], plain[name], 0.0) for got, want, plain in results])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_take_plain_steps(dtype):
    rule = RULES["usual"]
    given = {name: t.to(dtype) for name, t in inputs(70).items()}
    limit = 1e-12 if dtype == torch.float64 else 3e-2
    for name, want in exact(given, **rule).items():
        np.testing.assert_allclose(wide(by_kernel(given, rule)[name]), want, rtol=limit, atol=limit)


@pytest.mark.native
def test_a_number_is_the_same_wherever_it_stands_and_for_any_number_of_threads(native):
    given, rule, threads = inputs(40_000), RULES["usual"], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = by_kernel(given, rule)
        torch.set_num_threads(3)
        assert all(torch.equal(t, whole[name]) for name, t in by_kernel(given, rule).items())
    finally:
        torch.set_num_threads(threads)
    for begin, end in ((0, 1), (5, 8), (1, 20), (39_990, 40_000)):
        part = by_kernel({name: t[begin:end] for name, t in given.items()}, rule)
        assert all(torch.equal(t, whole[name][begin:end]) for name, t in part.items())


def test_without_an_average_and_with_gradients_of_any_strides():
    given, rule = inputs(48), RULES["usual"]
    whole = by_kernel(given, rule)
    parts = {name: t.clone().view(6, 8) for name, t in given.items() if name != "average"}
    parts["gradient"] = parts["gradient"].t().contiguous().t()
    adamw_average_(**parts, **rule)
    assert all(torch.equal(parts[name].flatten(), whole[name]) for name in ("weight", "first", "second"))


def test_weights_with_gaps_are_written_too():
    given, rule = inputs(24), RULES["usual"]
    wide_weight = torch.zeros(24, 2)
    wide_weight[:, 0] = given["weight"]
    whole = by_kernel(given, rule)
    adamw_average_(**{**given, "weight": wide_weight[:, 0]}, **rule)
    torch.testing.assert_close(wide_weight[:, 0], whole["weight"])
    assert not wide_weight[:, 1].any()


def test_nan_stays_where_it_is():
    given = inputs(50)
    given["gradient"][7] = float("nan")
    for name, t in by_kernel(given, RULES["usual"]).items():
        assert t.isnan().nonzero().flatten().tolist() == [7], name


def test_autograd_sees_that_a_weight_was_written():
    weight = torch.randn(9, requires_grad=True)
    loss = weight.square().sum()
    adamw_average_(weight, *(torch.rand(9) for _ in range(3)), step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.native
def test_opcheck(native):
    given = inputs(30)
    tensors = [given[name] for name in ("weight", "gradient", "first", "second", "average")]
    for average in (tensors[-1], None):
        arguments = (*tensors[:4], average, 3, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5, 0.9)
        torch.library.opcheck(torch.ops.ditscale.adamw_average_.default, arguments)


@pytest.mark.native
def test_lesser_instruction_sets(lesser_isa):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_values or stands"]
    ran = subprocess.run(command, env={**os.environ, "DITSCALE_CPU_ISA": lesser_isa}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]


def test_mistakes_are_named():
    given = inputs(8)
    with pytest.raises(InputError, match=r"second: expected the shape of weight, \[8\], got \[7\]"):
        adamw_average_(**{**given, "second": torch.zeros(7)}, step=1, lr=0.1)
    with pytest.raises(InputError, match="step: expected at least 1, got 0"):
        adamw_average_(**given, step=0, lr=0.1)


@pytest.mark.native
def test_the_operator_itself_refuses_what_it_cannot_take(native):
    given = inputs(8)
    for name, other in (
        ("first", torch.zeros(9)),
        ("second", torch.zeros(8).double()),
        ("average", torch.zeros(8, 2)[:, 0]),
    ):
        tensors = [{**given, name: other}[n] for n in ("weight", "gradient", "first", "second", "average")]
        with pytest.raises(RuntimeError, match=f"{name}: expected float32 numbers without gaps"):
            torch.ops.ditscale.adamw_average_(*tensors, 1, 0.1, 0.9, 0.95, 1e-8, 0.0, 1.0, 0.0)


def test_cost():
    assert cost.adamw_bytes(10, average=True) == 360 and cost.adamw_bytes(10, average=False) == 280
    assert cost.adamw_flops(10, average=True) == 180
