"""Triton's interpreter without work that it repeats: for tests and for counting what kernels read and write.

For every call of a device function, each sum among them, the interpreter puts its own functions in the place of all that
``triton.language`` has; they are already there, for the launch did the same. It makes the table of dtypes anew wherever it looks
one up. And it works out for every sum and product of integers whether they overflow, but says so to a debugger alone. Together
they are two thirds of its time.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any


@functools.cache
def hasten() -> None:
    """From now on the interpreter of this process does the first once a launch, the second once a dtype and the third never.

    Does nothing where this Triton's interpreter lacks one of the functions that are replaced.
    """
    from triton.runtime import interpreter

    names = ("_patch_lang", "_LangPatchScope", "GridExecutor", "_get_np_dtype", "interpreter_builder", "tl")
    if not all(hasattr(interpreter, name) for name in names):
        return
    _patch_once(interpreter)
    _remember_dtypes(interpreter)
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _patch_once(interpreter: Any) -> None:
    patch, launch, tl = interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter.tl
    patched: set[tuple[bool, bool]] = set()  # in this launch, by the modules that a function sees

    @functools.cache
    def seen(function: Any) -> tuple[bool, bool]:
        held = function.__globals__.values()
        return any(v is tl for v in held), any(v is tl.core for v in held)

    def once(function: Any) -> Any:
        if seen(function) in patched:
            return interpreter._LangPatchScope()
        patched.add(seen(function))
        return patch(function)

    def anew(self: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        return launch(self, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, anew


def _remember_dtypes(interpreter: Any) -> None:
    look_up, found = interpreter._get_np_dtype, {}

    def remembered(dtype: Any) -> Any:
        if type(dtype) is not interpreter.tl.dtype:  # pointers and blocks have no hash
            return look_up(dtype)
        if dtype not in found:
            found[dtype] = look_up(dtype)
        return found[dtype]

    interpreter._get_np_dtype = remembered
