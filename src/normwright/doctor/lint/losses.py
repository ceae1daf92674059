"""Calls of losses, by what they certainly are."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from .models import keyword
from .source import Source

__all__ = ["losses"]


def losses(source: Source, wanted: set[str]) -> Iterator[tuple[ast.Call, ast.expr]]:
    """The calls of the losses named (functions or modules), each with its input."""
    for call in source.calls:
        given = keyword(call, "input", 0)
        if given is None or isinstance(given, ast.Starred):
            continue
        qual = source.qual(call.func)
        if qual in wanted:
            if not qual.rpartition(".")[2][:1].isupper():
                yield call, given
        elif not qual:
            makers = source.origins(call.func)
            if (makers and all(isinstance(m, ast.Call) and source.qual(m.func) in wanted for m in makers)) or (
                makers and all(_named(source, m, wanted) for m in makers)
            ):
                yield call, given


def _named(source: Source, node: ast.AST | None, wanted: set[str]) -> bool:
    """`criterion = F.cross_entropy`."""
    return source.qual(node) in wanted and not source.qual(node).rpartition(".")[2][:1].isupper()
