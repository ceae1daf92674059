"""Numbers that the source fixes."""

from __future__ import annotations

import ast
import operator

from .source import Source

__all__ = ["number"]

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def number(source: Source, node: ast.AST | None) -> float | None:
    """The value of an expression of constants, also through names; None where the source does not fix it."""
    if isinstance(node, ast.Constant):
        known = isinstance(node.value, (int, float)) and not isinstance(node.value, bool)
        return float(node.value) if known else None  # type: ignore[arg-type]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = number(source, node.operand)
        return None if value is None else -value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left, right = number(source, node.left), number(source, node.right)
        if left is None or right is None or (right == 0 and isinstance(node.op, ast.Div)):
            return None
        return OPERATORS[type(node.op)](left, right)
    if isinstance(node, (ast.Name, ast.Attribute)):
        origins = source.origins(node)
        if len(origins) == 1 and origins[0] is not node and origins[0] is not None:
            return number(source, origins[0])
    return None
