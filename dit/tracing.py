"""Counting any torch model: a twin on the meta device runs once under torch's counter, with repairs, and
nothing unknown passes.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ditscale.dit.attribution import EVERYTHING, ModuleAttribution
from ditscale.dit.checks import need_choice
from ditscale.dit.conventions import COUNTED
from ditscale.dit.ledger import aligned
from ditscale.dit.torch_costs import Formula, all_cost, all_formulas, is_light, matmul_formulas, own_operators, raw
from ditscale.errors import InputError


@dataclass(frozen=True)
class TraceReport:
    """What one forward and one backward pass of a torch model cost.

    Attributes:
        model: its class.
        convention: "matmul", "all" or "hardware".
        forward, backward: FLOPs.
        params, trainable: numbers in its parameters.
        modules: (name, forward, backward) of every module that did counted work, parents before children; a
            module's numbers hold its children's.
        operations: (operation, forward, backward), largest first.
    """

    model: str
    convention: str
    forward: int
    backward: int
    params: int
    trainable: int
    modules: tuple[tuple[str, int, int], ...]
    operations: tuple[tuple[str, int, int], ...]

    @property
    def train(self) -> int:
        """Forward and backward."""
        return self.forward + self.backward

    def module(self, name: str) -> tuple[int, int]:
        """(forward, backward) of a module by its name in ``named_modules``."""
        for found, forward, backward in self.modules:
            if found == name:
                return forward, backward
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        fields = ("name", "forward", "backward")
        return {
            "model": self.model,
            "convention": self.convention,
            "forward_flops": self.forward,
            "backward_flops": self.backward,
            "train_flops": self.train,
            "params": {"total": self.params, "trainable": self.trainable},
            "modules": [dict(zip(fields, row, strict=True)) for row in self.modules],
            "operations": [dict(zip(fields, row, strict=True)) for row in self.operations],
        }

    def __str__(self) -> str:
        rows = [(name, f"{forward:,}", f"{backward:,}") for name, forward, backward in self.modules]
        total = ("total", f"{self.forward:,}", f"{self.backward:,}")
        head = f"{self.model}, convention {self.convention}\n"
        return head + aligned([("module", "forward", "backward"), *rows, total], right=2)


def trace(
    model: nn.Module,
    *inputs: Any,
    backward: bool = True,
    loss: Callable[[Any], Any] | None = None,
    convention: str = "matmul",
    formulas: Mapping[Any, Formula | int] | None = None,
    sharded: str = "local",
    **keyword_inputs: Any,
) -> TraceReport:
    """Count any torch model exactly, without running it on its device.

    A copy of the model with empty tensors on the meta device runs once, under ``torch.utils.flop_counter``
    with the formulas that torch misses (see ``ditscale.dit.torch_costs``). The model itself is neither run
    nor changed: never wrap a training loop in a counter, count a twin once.

    Args:
        model: in the mode (train or eval) that is to be counted; frozen parameters take no gradient.
        inputs, keyword_inputs: what ``model`` is called with. Tensors give shape, dtype and ``requires_grad``
            only.
        backward: count the backward pass too. Default: True.
        loss: from the model's output to what is differentiated. Default: every floating-point tensor of the
            output.
        convention: "matmul" (matrix products), "hardware" (and the scores that fused attention forms again)
            or "all" (every operation by the table of ``ditscale.dit.elementwise``). Default: "matmul".
        formulas: operator packets, such as ``torch.ops.my.operator``, to a function of its arguments and
            ``out_val``, or to 0 for work that need not be counted. Default: None.
        sharded: for tensors sharded over a mesh, count what this rank does ("local") or what all do together
            ("global"). Default: "local".

    Returns:
        TraceReport.

    Raises:
        InputError: an operation was met that might multiply matrices and that no formula counts (all are
            listed); the model cannot be copied or does not run on the meta device; nothing of the output can
            be differentiated.
    """
    need_choice("convention", convention, COUNTED)
    if sharded not in ("local", "global"):
        raise InputError(f"sharded: expected local or global, got {sharded!r}")
    twin = meta_twin(model)
    args, kwargs = _to_meta(inputs), _to_meta(keyword_inputs)
    everything = convention == "all"
    table = all_formulas() if everything else matmul_formulas(hardware=convention == "hardware")
    table |= _as_formulas(formulas or {})
    counter = FlopCounterMode(display=False, custom_mapping=table)
    attribution = ModuleAttribution(twin)
    counter.mod_tracker = attribution  # type: ignore[assignment]
    watch = Watch(attribution, table, everything=everything)
    # Modes nest: the last sees an operation first, and what the counter does not take apart reaches the watch.
    with _slow_path(), watch, counter, _Entrance(local=sharded == "local"):
        out = _run(lambda: twin(*args, **kwargs))
        after_forward = _totals(counter, watch)
        if backward:
            _run(lambda: _backward(out if loss is None else loss(out), twin))
    after_all = _totals(counter, watch)
    if watch.uncounted:
        found = ", ".join(f"{name} ({times})" for name, times in sorted(watch.uncounted.items()))
        raise InputError(
            f"model: expected operations whose cost is known, got {found}; "
            "give formulas={operator: function} for them"
        )
    return _report(model, convention, after_forward, after_all)


def meta_twin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose tensors are empty and on the meta device; memory for none of them is taken.

    Raises:
        InputError: the model cannot be copied.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if any(_is_fully_sharded(module) for module in model.modules()):
        raise InputError("model: expected one that FSDP does not shard yet: trace it before fully_shard")
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in tree_leaves([module._parameters, module._buffers, _plain_tensors(module)]):
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                empty = tensor.detach().to("meta").requires_grad_(tensor.requires_grad)
                memo[id(tensor)] = (
                    nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
                )
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(f"model: expected a module that can be copied to be counted, got {error}") from error


def _is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP holds this module's weights (both of torch's kinds), told by the classes' names: torch.distributed need
    not be there.
    """
    return any(cls.__name__ in ("FSDPModule", "FullyShardedDataParallel") for cls in type(module).__mro__)


class Watch(TorchDispatchMode):
    """Sees every operation that torch's counter runs: notes those that nobody counts, and counts all by the
    table.
    """

    supports_higher_order_operators = True

    def __init__(self, attribution: ModuleAttribution, table: dict[Any, Formula], *, everything: bool) -> None:
        super().__init__()
        self.uncounted: Counter[str] = Counter()
        self.flops: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._attribution = attribution
        self._everything = everything
        # An operator of ours that the table leaves out is one that nobody decided on yet.
        undecided = own_operators().keys() - table.keys()
        self._counted = {op: formula for op, formula in {**flop_registry, **table}.items() if op not in undecided}
        self._outer = _OuterProducts()
        self._light: dict[Any, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = self.run(func, args, kwargs)
        packet = getattr(func, "_overloadpacket", func)
        if packet not in self._counted:
            if not self._known_light(func):
                self.uncounted[str(packet)] += 1
            elif self._outer.is_product(func, args, out):
                self.uncounted[f"{packet} of a broadcast product"] += 1
        if self._everything:
            cost = all_cost(packet, args, kwargs, out, self._counted)
            if cost is None:
                if not getattr(func, "is_view", False) and str(packet) not in self.uncounted:
                    self.uncounted[str(packet)] += 1
            elif cost:
                operation = str(packet)
                for name in self._attribution.parents:
                    self.flops[name][operation] += cost
        return out

    def _known_light(self, func: Any) -> bool:
        if func not in self._light:
            self._light[func] = not isinstance(func, torch._ops.HigherOrderOperator) and is_light(func)
        return self._light[func]

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run the operation itself."""
        return func(*args, **kwargs)


class _OuterProducts:
    """Finds matrix products written as a broadcast multiplication and a sum: ``(a[:, :, None] * b[None]).sum(1)``, also where
    what is summed was scaled, cast or copied on its way.
    """

    _CARRIES = ("mul", "div", "neg", "clone", "_to_copy", "_unsafe_view")

    def __init__(self) -> None:
        self._marked: dict[int, Tensor] = {}

    def is_product(self, func: Any, args: Any, out: Any) -> bool:
        """Whether this operation sums up a product that was larger than both of its factors."""
        name = func._overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, Tensor)]
        factors = name == "mul" and len(tensors) == 2 and out.is_floating_point()
        if factors and out.numel() > max(_numbers(t) for t in tensors):
            self._marked[id(out)] = out  # kept alive, so its id is its own
        found = next((t for t in tensors if id(t) in self._marked), None)
        if found is None:
            return False
        if isinstance(out, Tensor) and (func.is_view or (name in self._CARRIES and out.numel() == found.numel())):
            self._marked[id(out)] = out
            return False
        return found is tensors[0] and name in ("sum", "mean") and out.numel() < found.numel()


def _numbers(t: Tensor) -> int:
    """Of a factor in the forward pass: an expanded one holds no more than before. Gradients of sums come expanded, too, but what
    they are multiplied by is no matrix product's other factor.
    """
    if torch._C._current_autograd_node() is not None:
        return t.numel()
    return prod(n for n, step in zip(t.shape, t.stride(), strict=True) if step != 0)


class _Entrance(TorchDispatchMode):
    """Sees every operation before torch's counter: lets sharded tensors take themselves apart first, so that the
    counter sees this rank's share, and turns away operators that hold models of their own.
    """

    supports_higher_order_operators = True

    def __init__(self, *, local: bool) -> None:
        super().__init__()
        self._local = local

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.HigherOrderOperator) and func not in flop_registry:
            raise InputError(f"model: expected one without control flow, whose cost depends on data; got {func}")
        if self._local:
            names = {t.__name__ for t in types}
            if "DTensor" in names:
                return NotImplemented
            if "FakeTensor" in names:  # how a sharded operation finds its result's shape: no work of the model's
                with _disable_current_modes():
                    return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _slow_path() -> Iterator[None]:
    """Attention layers of torch.nn run as separate operations, not as one that hides its parts."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _run(call: Callable[[], Any]) -> Any:
    """What a twin raises, an eager model may well run: operations without shapes for meta, values that are read."""
    try:
        return call()
    except InputError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"model: expected one that runs on the meta device with these inputs, got {type(error).__name__}: {said}"
        ) from error


def _backward(out: Any, twin: nn.Module) -> None:
    ends = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
    if not ends:
        if not any(p.requires_grad for p in twin.parameters()):
            return
        raise InputError("model: expected an output that can be differentiated, got none; give backward=False or loss=")
    torch.autograd.backward(ends, [torch.empty_like(t) for t in ends])


def _totals(counter: FlopCounterMode, watch: Watch) -> dict[str, dict[str, int]]:
    if watch._everything:
        return {name: dict(by) for name, by in watch.flops.items()}
    return {name: {str(op): n for op, n in by.items()} for name, by in counter.get_flop_counts().items()}


def _report(
    model: nn.Module, convention: str, forward: dict[str, dict[str, int]], both: dict[str, dict[str, int]]
) -> TraceReport:
    names = [type(model).__name__, *(name for name, _ in model.named_modules() if name)]
    names += sorted(both.keys() - set(names) - {EVERYTHING})
    modules = []
    for name in names:
        ahead, whole = sum(forward.get(name, {}).values()), sum(both.get(name, {}).values())
        if whole:
            modules.append((name, ahead, whole - ahead))
    operations = [
        (op, forward.get(EVERYTHING, {}).get(op, 0), n - forward.get(EVERYTHING, {}).get(op, 0))
        for op, n in both.get(EVERYTHING, {}).items()
    ]
    operations.sort(key=lambda row: -(row[1] + row[2]))
    ahead, whole = sum(row[1] for row in operations), sum(row[1] + row[2] for row in operations)
    parameters = list(model.parameters())
    return TraceReport(
        model=type(model).__name__,
        convention=convention,
        forward=ahead,
        backward=whole - ahead,
        params=sum(p.numel() for p in parameters),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        modules=tuple(modules),
        operations=tuple(operations),
    )


def _to_meta(value: Any) -> Any:
    def empty(leaf: Any) -> Any:
        return leaf.detach().to("meta").requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf

    return tree_map(empty, value)


def _plain_tensors(module: nn.Module) -> list[Any]:
    """Tensors that a module holds as ordinary attributes, in lists, tuples or dictionaries too."""
    hidden = ("_parameters", "_buffers", "_modules")
    return [value for name, value in vars(module).items() if name not in hidden and not name.endswith("_hooks")]


def _as_formulas(given: Mapping[Any, Formula | int]) -> dict[Any, Formula]:
    table: dict[Any, Formula] = {}
    for operator, formula in given.items():
        packet = getattr(operator, "_overloadpacket", operator)
        if formula == 0:
            formula = _nothing
        if not callable(formula):
            raise InputError(f"formulas: expected a function or 0 for {packet}, got {formula!r}")
        table[packet] = raw(formula)
    return table


def _nothing(*_: Any, **__: Any) -> int:
    return 0
