"""Small wrong versions of a module's source: one number, operator or choice changed at a time."""

from __future__ import annotations

import ast
import copy
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Gt: ast.GtE,
    ast.Lt: ast.LtE,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


def mutants(module: ModuleType, skip: frozenset[str] = frozenset()) -> Iterator[tuple[str, ModuleType]]:
    """(description, mutated module) for every change that can be made to ``module``.

    Args:
        module: its source is read from its file.
        skip: functions that are left alone, variables whose assignments are, and named arguments that are.
    """
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    tree = ast.parse(source)
    places = list(_places(tree, skip))
    lines = source.splitlines()
    for node, what in places:
        before = copy.copy(node.__dict__)
        _change(node)
        fresh = types.ModuleType(module.__name__)
        fresh.__file__ = module.__file__
        exec(compile(tree, str(module.__file__), "exec"), fresh.__dict__)
        node.__dict__.update(before)
        yield f"{what} in `{lines[node.lineno - 1].strip()}`", fresh


def _places(tree: ast.AST, skip: frozenset[str]) -> Iterator[tuple[ast.AST, str]]:
    if isinstance(tree, (ast.FunctionDef, ast.ClassDef)) and tree.name in skip:
        return
    if isinstance(tree, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        targets = tree.targets if isinstance(tree, ast.Assign) else [tree.target]
        names = {getattr(node, "id", getattr(node, "attr", "")) for target in targets for node in ast.walk(target)}
        if names & skip:
            return
    if isinstance(tree, ast.keyword) and tree.arg in skip:
        return
    if isinstance(tree, (ast.Raise, ast.Subscript, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return
    if isinstance(tree, ast.Constant) and isinstance(tree.value, (bool, int)):
        yield tree, f"constant {tree.value}"
    if isinstance(tree, ast.BinOp) and type(tree.op) in _SWAPS:
        yield tree, type(tree.op).__name__
    if isinstance(tree, ast.BoolOp):
        yield tree, type(tree.op).__name__
    if isinstance(tree, ast.Compare) and type(tree.ops[0]) in _SWAPS:
        yield tree, type(tree.ops[0]).__name__
    if isinstance(tree, ast.arguments):
        # Annotations hold no arithmetic.
        for default in (*tree.defaults, *(d for d in tree.kw_defaults if d is not None)):
            yield from _places(default, skip)
        return
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _places(child, skip)


def _change(node: ast.AST) -> None:
    if isinstance(node, ast.Constant):
        node.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, (ast.BinOp, ast.BoolOp)):
        node.op = _SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare):
        node.ops = [_SWAPS[type(node.ops[0])](), *node.ops[1:]]
