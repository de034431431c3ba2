"""Which module an operation belongs to, in the forward and in the backward pass."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

import torch
from torch import nn

EVERYTHING = "Global"


class ModuleAttribution:
    """Stands in for the module tracker of ``torch.utils.flop_counter.FlopCounterMode``: assign it to
    ``.mod_tracker``.

    Torch's own tracker follows tensor hooks, and so never leaves a module whose input takes no gradient, and
    loses its place where two modules share an input. Here every autograd node carries the number under which
    it was made, and the modules that were running at that number are its modules.

    Args:
        model: its modules are named as in ``named_modules``, the model itself by its class's name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._root = type(model).__name__
        self._names = {id(module): name or self._root for name, module in model.named_modules()}
        self._stack: tuple[str, ...] = ()
        self._numbers: list[int] = [0]
        self._stacks: list[tuple[str, ...]] = [()]
        self._hooks: list[Any] = []

    def __enter__(self) -> ModuleAttribution:
        hooks = nn.modules.module
        self._hooks = [
            hooks.register_module_forward_pre_hook(self._enter_module),
            hooks.register_module_forward_hook(self._leave_module, always_call=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def parents(self) -> set[str]:
        """The names that the operation running now counts towards, ``EVERYTHING`` among them."""
        node = torch._C._current_autograd_node()
        made_in = () if node is None else self._stacks[bisect_right(self._numbers, node._sequence_nr()) - 1]
        if not self._stack:
            return {EVERYTHING, *made_in}
        # Modules run inside the backward pass where a checkpoint repeats them: what asked for that is none of
        # theirs.
        first = self._stack[0]
        around = [name for name in made_in if name == self._root or first.startswith(f"{name}.")]
        return {EVERYTHING, *around, *self._stack}

    def _enter_module(self, module: nn.Module, _: object) -> None:
        self._move((*self._stack, self._names.get(id(module), type(module).__name__)))

    def _leave_module(self, *_: object) -> None:
        self._move(self._stack[:-1])

    def _move(self, stack: tuple[str, ...]) -> None:
        self._stack = stack
        self._numbers.append(torch._C._autograd._get_sequence_nr())
        self._stacks.append(stack)
