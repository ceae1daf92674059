"""What was found, as text, JSON, SARIF, or GitHub's annotations."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from .linter import SYNTAX, Problem, Result
from .rule import all_rules

__all__ = ["FORMATS", "show"]

LEVELS = {"error": "error", "warning": "warning", "advice": "note"}


def show(result: Result, format: str = "text") -> str:
    """The result in one of `FORMATS`."""
    return FORMATS[format](result)


def _place(problem: Problem) -> str:
    cell = "" if problem.cell is None else f"cell {problem.cell}:"
    return f"{problem.path}:{cell}{problem.line}:{problem.column}"


def _text(result: Result) -> str:
    parts = []
    for problem in result.problems:
        lines = [f"{_place(problem)}: {problem.code} {problem.message}"]
        if problem.text.strip():
            lines += _excerpt(problem)
        if problem.help:
            lines.append(f"    = help: {problem.help}")
        parts.append("\n".join(lines) + "\n")
    count = len(result.problems)
    if not count:
        parts.append("All checks passed!")
    else:
        parts.append(f"Found {count} problem{'s' if count > 1 else ''}.")
    return "\n".join(parts)


def _excerpt(problem: Problem) -> list[str]:
    shown = problem.text.replace("\t", " ")
    indent = len(shown) - len(shown.lstrip())
    end = problem.end_column if problem.end_line == problem.line else len(shown.rstrip()) + 1
    marks = "^" * max(1, end - problem.column)
    gutter = " " * len(str(problem.line))
    return [
        f"  {gutter} |",
        f"  {problem.line} | {shown.strip()}",
        f"  {gutter} | {' ' * max(0, problem.column - 1 - indent)}{marks}",
    ]


def _json(result: Result) -> str:
    return json.dumps([_entry(problem) for problem in result.problems], indent=2, ensure_ascii=False)


def _entry(problem: Problem) -> dict[str, Any]:
    return {
        "code": problem.code,
        "name": problem.name,
        "severity": problem.severity,
        "message": problem.message,
        "help": problem.help or None,
        "filename": str(problem.path),
        "cell": problem.cell,
        "location": {"row": problem.line, "column": problem.column},
        "end_location": {"row": problem.end_line, "column": problem.end_column},
    }


def _sarif(result: Result) -> str:
    rules = [
        {
            "id": rule.code,
            "name": rule.name,
            "shortDescription": {"text": rule.page().summary},
            "fullDescription": {"text": rule.page().sections["Why is this bad"]},
            "help": {"text": str(rule.page())},
            "defaultConfiguration": {"level": LEVELS[rule.severity]},
        }
        for rule in all_rules()
    ]
    rules.insert(0, {"id": SYNTAX, "name": "unreadable", "shortDescription": {"text": "The file cannot be parsed."}})
    index = {rule["id"]: i for i, rule in enumerate(rules)}
    results = [
        {
            "ruleId": problem.code,
            "ruleIndex": index[problem.code],
            "level": LEVELS[problem.severity],
            "message": {"text": ". ".join(filter(None, (_in_cell(problem) + problem.message, problem.help)))},
            "locations": [
                {
                    "physicalLocation": {
                        "artifactLocation": {"uri": problem.path.as_posix()},
                        "region": {
                            "startLine": problem.line,
                            "startColumn": problem.column,
                            "endLine": problem.end_line,
                            "endColumn": problem.end_column,
                        },
                    }
                }
            ],
        }
        for problem in result.problems
    ]
    driver = {"name": "normwright", "version": version("normwright"), "rules": rules}
    log = {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}],
    }
    return json.dumps(log, indent=2, ensure_ascii=False)


def _in_cell(problem: Problem) -> str:
    return "" if problem.cell is None else f"cell {problem.cell}: "


def _github(result: Result) -> str:
    return "\n".join(_annotation(problem) for problem in result.problems)


def _annotation(problem: Problem) -> str:
    level = {"error": "error", "warning": "warning", "advice": "notice"}[problem.severity]
    properties = {
        "title": f"normwright ({problem.code})",
        "file": str(problem.path),
        "line": problem.line,
        "col": problem.column,
        "endLine": problem.end_line,
        "endColumn": problem.end_column,
    }
    given = ",".join(f"{key}={_escape(str(value), also=':,')}" for key, value in properties.items())
    message = ". ".join(filter(None, (_in_cell(problem) + problem.message, problem.help)))
    return f"::{level} {given}::{_escape(f'{problem.code} {message}')}"


def _escape(text: str, also: str = "") -> str:
    for character in "%\r\n" + also:
        text = text.replace(character, f"%{ord(character):02X}")
    return text


FORMATS: dict[str, Callable[[Result], str]] = {"text": _text, "json": _json, "sarif": _sarif, "github": _github}
