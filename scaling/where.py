"""``--where``: a small, safe expression over the columns of a run table."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ditscale.errors import InputError

_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_ARITHMETIC: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_GRAMMAR = "comparisons of columns and values joined by and, or, not; + - * /; names with spaces in backticks"


def evaluate(expression: str, columns: Mapping[str, NDArray[Any]], rows: int) -> NDArray[np.bool_]:
    """The rows for which an expression holds.

    Args:
        expression: such as ``params > 1e7 and lr_schedule == "cosine"`` or ``\\`Model Size\\` >= 1e8``.
        columns: the table's columns.
        rows: how many rows.

    Raises:
        InputError: it does not parse, names no column, or is more than comparisons and arithmetic.
    """
    quoted: dict[str, str] = {}

    def hide(match: re.Match[str]) -> str:
        quoted[f"_column_{len(quoted)}"] = match.group(1)
        return f"_column_{len(quoted) - 1}"

    try:
        tree = ast.parse(re.sub(r"`([^`]*)`", hide, expression), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise InputError(f"where: expected {_GRAMMAR}, got {expression!r}") from None

    def walk(node: ast.AST) -> Any:
        if isinstance(node, ast.Expression):
            return walk(node.body)
        if isinstance(node, ast.BoolOp):
            parts = [_as_mask(walk(v), rows, expression) for v in node.values]
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return join.reduce(parts)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~_as_mask(walk(node.operand), rows, expression)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.Compare):
            left, result = walk(node.left), True
            for op, right_node in zip(node.ops, node.comparators, strict=True):
                if type(op) not in _COMPARE:
                    break
                right = walk(right_node)
                result = np.logical_and(result, _COMPARE[type(op)](left, right))
                left = right
            else:
                return result
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](walk(node.left), walk(node.right))
        if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool)):
            return node.value
        if isinstance(node, ast.Name):
            name = quoted.get(node.id, node.id)
            if name in columns:
                return columns[name]
            raise InputError(f"where: expected a column ({', '.join(columns)}), got {name!r}")
        raise InputError(f"where: expected {_GRAMMAR}, got {expression!r}")

    try:
        with np.errstate(all="ignore"):
            return _as_mask(walk(tree), rows, expression)
    except (TypeError, ZeroDivisionError, RecursionError, OverflowError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"where: {expression!r} compares what cannot be compared ({error})") from None


def _as_mask(value: Any, rows: int, expression: str) -> NDArray[np.bool_]:
    mask = np.asarray(value)
    if mask.dtype == object and all(isinstance(v, (bool, np.bool_)) for v in mask.ravel()):
        mask = mask.astype(bool)
    if mask.dtype != bool:
        raise InputError(f"where: expected a comparison, got {expression!r}")
    return np.broadcast_to(mask, (rows,)).copy()
