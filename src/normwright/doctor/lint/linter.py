"""Running the rules over files."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...lab.errors import UserError
from .files import Text, find, read
from .rule import Found, Rule, all_rules

__all__ = ["SYNTAX", "Problem", "Result", "lint", "select"]

SYNTAX = "NW900"
NOQA = re.compile(r"#\s*noqa(?P<codes>\s*:\s*[A-Z]+[0-9]+(?:[,\s]+[A-Z]+[0-9]+)*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Problem:
    """One fault at one place.

    Arguments:
        path: the file, as it was named or found.
        cell: for a notebook, the number of the cell from 1.
        line, column, end_line, end_column: from 1, in the file or the cell, the end exclusive in its column.
        code, name, severity: the rule's; `NW900`, `unreadable` for a file that could not be read or parsed.
        message: what is wrong, here.
        help: what to do; empty for `NW900`.
        text: the line, for display.
    """

    path: Path
    cell: int | None
    line: int
    column: int
    end_line: int
    end_column: int
    code: str
    name: str
    severity: str
    message: str
    help: str
    text: str


@dataclass(frozen=True)
class Result:
    """What the rules found, in the order of the files and lines, and how many files were looked at."""

    problems: list[Problem] = field(default_factory=list)
    files: int = 0


def select(chosen: Sequence[str] = (), ignored: Sequence[str] = ()) -> tuple[type[Rule], ...]:
    """The rules whose code begins with, or whose name is, one of those chosen (all if none) and none of those ignored.

    Errors: `UserError` for what fits no rule.
    """
    rules = all_rules()

    def fits(rule: type[Rule], wanted: str) -> bool:
        return rule.code.startswith(wanted.upper()) or rule.name == wanted.lower()

    for wanted in (*chosen, *ignored):
        if not any(fits(rule, wanted) for rule in rules) and wanted.upper() != SYNTAX:
            names = f"{rules[0].code} to {rules[-1].code}"
            raise UserError(f"No rule is called {wanted!r}; give a code, its first characters, or a name: {names}.")
    kept = [rule for rule in rules if not chosen or any(fits(rule, wanted) for wanted in chosen)]
    return tuple(rule for rule in kept if not any(fits(rule, unwanted) for unwanted in ignored))


def lint(paths: Iterable[str | Path], rules: Iterable[type[Rule]] | None = None) -> Result:
    """Look for mistakes in Python files and notebooks, and below folders, by reading them alone.

    Arguments:
        paths: files and folders; a folder's `.venv`, `.git`, `build`, `node_modules` and the like are passed over.
        rules: those to use; all unless given.

    Errors: `UserError` for a path that does not exist.
    """
    chosen = [rule() for rule in (all_rules() if rules is None else rules)]
    problems: list[Problem] = []
    files = 0
    collecting = gc.isenabled()
    gc.disable()  # syntax trees are many small objects: twice as fast without
    try:
        for path in find(Path(p) for p in paths):
            files += 1
            problems += _lint_text(read(path), chosen)
            if files % 200 == 0:
                gc.collect()
    finally:
        if collecting:
            gc.enable()
    return Result(problems, files)


def _lint_text(text: Text, rules: list[Rule]) -> list[Problem]:
    problems = [_unreadable(text, *wrong) for wrong in text.wrong]
    if text.source is not None:
        code = "\n".join(text.lines)
        for rule in rules:
            if rule.words and not any(word in code for word in rule.words):
                continue
            for found in rule.find(text.source):
                problem = _problem(text, rule, found)
                if not _is_silenced(text, found, rule.code):
                    problems.append(problem)
    return sorted(problems, key=lambda p: (p.cell or 0, p.line, p.column, p.code))


def _unreadable(text: Text, line: int, column: int, message: str) -> Problem:
    cell, at = text.place(line)
    shown = text.lines[line - 1] if 0 < line <= len(text.lines) else ""
    return Problem(
        text.path, cell, at, column, at, column + 1, SYNTAX, "unreadable", "error", message, "", shown
    )  # fmt: skip


def _problem(text: Text, rule: Rule, found: Found) -> Problem:
    node = found.node
    first: int = node.lineno  # type: ignore[attr-defined]
    last: int = node.end_lineno  # type: ignore[attr-defined]
    cell, line = text.place(first)
    return Problem(
        text.path, cell, line, _column(text, first, node.col_offset), line + last - first,  # type: ignore[attr-defined]
        _column(text, last, node.end_col_offset), rule.code, rule.name, rule.severity, found.message,  # type: ignore[attr-defined]
        found.help, text.lines[first - 1],
    )  # fmt: skip


def _column(text: Text, line: int, offset: int) -> int:
    """The column from 1 in characters; the parser counts bytes of UTF-8 from 0."""
    return len(text.lines[line - 1].encode()[:offset].decode(errors="ignore")) + 1


def _is_silenced(text: Text, found: Found, code: str) -> bool:
    """Whether the first or the last line of the node says `# noqa`, alone or with the rule's code."""
    for line in {found.node.lineno, found.node.end_lineno}:  # type: ignore[attr-defined]
        comment = NOQA.search(text.lines[line - 1])
        if comment and (comment["codes"] is None or code in re.findall(r"[A-Z]+[0-9]+", comment["codes"].upper())):
            return True
    return False
