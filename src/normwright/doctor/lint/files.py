"""Finding and reading what is linted: Python files of any encoding, and notebooks."""

from __future__ import annotations

import ast
import io
import json
import os
import re
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...lab.errors import UserError
from .source import Source

__all__ = ["Text", "find", "read"]

SKIPPED = {
    ".venv", "venv", ".git", ".hg", ".svn", ".tox", ".nox", ".eggs", ".mypy_cache", ".pytest_cache", ".ruff_cache",
    ".ipynb_checkpoints", "__pycache__", "node_modules", "build", "dist", "site-packages",
}  # fmt: skip
ENDINGS = (".py", ".pyw", ".ipynb")
WHOLE_CELL = re.compile(r"\s*%%(?!time\b|timeit\b|capture\b|prun\b)")


@dataclass
class Text:
    """A file's code as one module.

    Arguments:
        path: the file.
        source: its module; None if it could not be read or parsed, or cannot be of interest.
        lines: the lines of the module, a notebook's cells one after the other.
        cells: for a notebook, (number of the first line, number of the cell from 1) of each code cell.
        wrong: what could not be read or parsed: (line and column in `lines`, what is wrong).
    """

    path: Path
    source: Source | None = None
    lines: list[str] = field(default_factory=list)
    cells: list[tuple[int, int]] = field(default_factory=list)
    wrong: list[tuple[int, int, str]] = field(default_factory=list)

    def place(self, line: int) -> tuple[int | None, int]:
        """The cell of a line of the module, and the line within the cell; for a plain file, None and the line."""
        for first, cell in reversed(self.cells):
            if first <= line:
                return cell, line - first + 1
        return None, line


def find(paths: Iterable[Path]) -> Iterator[Path]:
    """The files named, and those below the folders named, each once, in order.

    Errors: `UserError` for a path that does not exist.
    """
    paths = list(paths)
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no file or folder {path}; name files and folders that exist.")
    seen = set()
    for path in paths:
        for found in [path] if path.is_file() else _below(path):
            if found not in seen:
                seen.add(found)
                yield found


def _below(folder: Path) -> Iterator[Path]:
    for at, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.endswith(".egg-info"))
        yield from (Path(at, name) for name in sorted(names) if name.endswith(ENDINGS))


def read(path: Path) -> Text:
    """Read and parse a file or a notebook; one that never says torch is not parsed."""
    text = Text(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        text.wrong.append((1, 1, f"cannot be read: {error.strerror}"))
        return text
    if b"torch" not in raw:
        return text
    if path.suffix == ".ipynb":
        _read_notebook(raw, text)
    else:
        _read_file(raw, text)
    return text


def _read_file(raw: bytes, text: Text) -> None:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        code = raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        text.wrong.append((1, 1, f"cannot be decoded: {error}"))
        return
    # as the parser counts lines: no other separators than these end one
    text.lines = re.split(r"\r\n|\r|\n", code)
    tree, wrong = _parse("\n".join(text.lines))
    if wrong:
        text.wrong.append(wrong)
    elif tree is not None:
        text.source = Source(tree, text.lines)


def _read_notebook(raw: bytes, text: Text) -> None:
    try:
        cells = json.loads(raw)["cells"]
        sources = [(i, cell["cell_type"], cell["source"]) for i, cell in enumerate(cells, 1)]
    except (ValueError, KeyError, TypeError):
        text.wrong.append((1, 1, "is not a notebook of format 4"))
        return
    for number, kind, source in sources:
        if kind != "code":
            continue
        code = source if isinstance(source, str) else "".join(source)
        lines = _without_magic(re.split(r"\r\n|\r|\n", code))
        first = len(text.lines) + 1
        text.cells.append((first, number))
        _, wrong = _parse("\n".join(lines))
        if wrong:
            text.wrong.append((wrong[0] + first - 1, *wrong[1:]))
            lines = [""] * len(lines)
        text.lines += lines
    tree, wrong = _parse("\n".join(text.lines))
    if wrong:
        text.wrong.append(wrong)
    elif tree is not None:
        text.source = Source(tree, text.lines)


def _without_magic(lines: list[str]) -> list[str]:
    """The lines of a cell with IPython's own syntax replaced by `pass` in the same place."""
    if lines and WHOLE_CELL.match(lines[0]):
        return [""] * len(lines)
    kept = [re.sub(r"^(\s*)(?:[%!?]|[\w.]+\s*=\s*[%!]).*", r"\1pass", line) for line in lines]
    return [re.sub(r"^(\s*)[\w.]+\?\??\s*$", r"\1pass", line) for line in kept]


def _parse(code: str) -> tuple[ast.Module | None, tuple[int, int, str] | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in someone's string is not our business
            flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            return compile(code, "<source>", "exec", flags, dont_inherit=True), None
    except SyntaxError as error:
        return None, (error.lineno or 1, error.offset or 1, f"invalid syntax: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        return None, (1, 1, f"cannot be parsed: {error}")
