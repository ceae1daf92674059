"""What a rule is, and what it finds."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from ..page import Page
from . import rules
from .source import Source

__all__ = ["Found", "Rule", "all_rules"]


@dataclass(frozen=True, eq=False)
class Found:
    """One fault in a source: the node that shows it, what is wrong, and what to do."""

    node: ast.AST
    message: str
    help: str


class Rule:
    """One mistake that the source alone shows. Subclass it in a file of its own under `doctor/lint/rules/`.

    The docstring is the page, with the sections of `page.TITLES`. Example and Use instead are whole programs: the tests
    lint both; Example must fire this rule and no other, Use instead none.

    Class attributes: `code` (`"NW901"`), `name` (reads as the fault), `severity` (`"error"`: results are wrong;
    `"warning"`: probably not what was meant), `words`: without one of them in the text, the rule need not look.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    severity: ClassVar[str]
    words: ClassVar[tuple[str, ...]] = ()

    def find(self, source: Source) -> Iterable[Found]:
        """The places where a module makes the mistake."""
        raise NotImplementedError

    @classmethod
    def page(cls) -> Page:
        """What the docstring says, by section."""
        return Page.of(cls)


@cache
def all_rules() -> tuple[type[Rule], ...]:
    """Every rule, by code."""
    found: dict[str, type[Rule]] = {}
    for info in pkgutil.iter_modules(rules.__path__):
        module = importlib.import_module(f"{rules.__name__}.{info.name}")
        for value in vars(module).values():
            own = isinstance(value, type) and issubclass(value, Rule) and value.__module__ == module.__name__
            if own and value.code in found:
                raise RuntimeError(f"A code names one rule; {value.code} is {found[value.code]} and {value}.")
            if own:
                found[value.code] = value
    return tuple(found[code] for code in sorted(found))
