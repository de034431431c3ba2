"""Tells torch of operators: schemas where Python defines them, shapes of results, FLOPs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


class Operator(NamedTuple):
    """What torch must know of an operator without running it.

    Attributes:
        schema: as csrc/bindings/schemas.cpp declares it (a test compares), without the name.
        fake: makes results of the right shapes and dtypes from arguments that may have no data.
        flops: of a call, from its arguments with shapes in the place of tensors.
        flops_of_tensors: ``flops`` wants the tensors themselves, for what it counts stands in one of them.
    """

    schema: str
    fake: Callable[..., Any]
    flops: Callable[..., int]
    flops_of_tensors: bool = False


def on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """``implementation`` with its first tensor's device as the current one: Triton launches on that, wherever tensors are."""

    @functools.wraps(implementation)
    def run(first: Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(first):
            return implementation(first, *others)

    return run


def heads_like(t: Tensor) -> Tensor:
    """An empty [B, H, T, K] over memory laid out [B, T, H, K], as operators on heads return it."""
    B, H, T, K = t.shape
    return t.new_empty_strided((B, H, T, K), (T * H * K, K, H * K, 1))


_libraries: list[torch.library.Library] = []  # what a library object defined lives as long as it does


def describe(namespace: str, operators: Mapping[str, Operator]) -> None:
    """Shapes and FLOPs of a namespace's operators, and that autograd passes them by: functions of ours stand around them."""
    library = torch.library.Library(namespace, "IMPL")
    for name, operator in operators.items():
        torch.library.register_fake(f"{namespace}::{name}", operator.fake)
        packet = getattr(getattr(torch.ops, namespace), name)
        register_flop_formula(packet, get_raw=operator.flops_of_tensors)(operator.flops)
        # Without this every call goes through a fallback that looks at its arguments one by one: half a microsecond.
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    _libraries.append(library)


def define(
    namespace: str, operators: Mapping[str, Operator], implementations: Mapping[str, Callable[..., Any]], key: str
) -> None:
    """Define the operators in Python, implemented for one dispatch key, and describe them."""
    library = torch.library.Library(namespace, "FRAGMENT")
    for name, operator in operators.items():
        library.define(name + operator.schema)
        library.impl(name, on_its_device(implementations[name]), key)
    _libraries.append(library)
    describe(namespace, operators)
