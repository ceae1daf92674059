"""What the site takes from the package: a page for each check, one of all studies, links to them, and docstrings."""

from __future__ import annotations

import ast
import re
import tempfile
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

import normwright
from normwright.doctor.command import write_markdown

_CHECK = re.compile(r"`normwright check (NW\d{3})`")
_STUDY = re.compile(r"`normwright study ([a-z][a-z-]*)`")
_LISTS = {"`normwright check --list`": "checks/index.md", "`normwright study --list`": "studies.md"}


def studies() -> str:
    """The docstring of every study, under its name."""
    parts = ["# Studies", "", "Each runs by `normwright study NAME`, and draws a report.", ""]
    for path in sorted((Path(normwright.__path__[0]) / "studies").glob("[a-z]*.py")):
        question, _, rest = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n\n")
        parts += [f"## {path.stem.replace('_', '-')}", "", f"**{' '.join(question.split())}**", "", rest, ""]
    return "\n".join(parts)


def on_files(files: Files, config: Any) -> Files:
    with tempfile.TemporaryDirectory() as folder:
        for path in write_markdown(Path(folder)):
            files.append(File.generated(config, f"checks/{path.name}", content=path.read_text(encoding="utf-8")))
    files.append(File.generated(config, "studies.md", content=studies()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """What a page of docs/ names as a command becomes a link to what the command prints; the checks' own stay."""
    if "/" in page.file.src_uri or page.file.src_uri == "studies.md":
        return markdown
    markdown = _CHECK.sub(r"[\g<0>](checks/\1.md)", markdown)
    markdown = _STUDY.sub(r"[\g<0>](studies.md#\1)", markdown)
    for command, page_of_all in _LISTS.items():
        markdown = markdown.replace(command, f"[{command}]({page_of_all})")
    return markdown


class Examples(griffe.Extension):
    """The section that these docstrings call `Example:` is called `Examples:` where mkdocstrings reads it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.M)
