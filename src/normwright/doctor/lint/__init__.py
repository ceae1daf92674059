"""`normwright lint`: mistakes around normalization that the source alone shows; nothing of it is run or imported."""

from .linter import Problem, Result, lint, select
from .rule import Found, Rule, all_rules
from .show import FORMATS, show

__all__ = ["FORMATS", "Found", "Problem", "Result", "Rule", "all_rules", "lint", "select", "show"]
