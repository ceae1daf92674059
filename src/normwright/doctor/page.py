"""The page of a check or a rule, read from its docstring."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass

__all__ = ["TITLES", "Page"]

TITLES = ("What it does", "Why is this bad", "Example", "Use instead", "Fix safety", "References")


@dataclass(frozen=True)
class Page:
    """What a docstring says about a fault: a summary, then sections.

    A section is its title on a line of its own, followed by an indented block. Example and Use instead are code,
    to be run as they stand.

    Arguments:
        summary: the text before the first section; one sentence.
        sections: the text of each section, by title, in the docstring's order and without its indentation.
    """

    summary: str
    sections: dict[str, str]

    @classmethod
    def of(cls, documented: type | str) -> Page:
        """Read the docstring of a class, or the text of one."""
        text = documented if isinstance(documented, str) else vars(documented).get("__doc__") or ""
        blocks: dict[str, list[str]] = {"": []}
        title = ""
        for line in inspect.cleandoc(text).splitlines():
            if line.rstrip() in TITLES:
                title = line.rstrip()
                blocks[title] = []
            else:
                blocks[title].append(line)
        sections = {title: textwrap.dedent("\n".join(block)).strip("\n") for title, block in blocks.items()}
        return cls(sections.pop("").strip(), sections)

    @property
    def example(self) -> str:
        """Code that has the fault."""
        return self.sections.get("Example", "")

    @property
    def use_instead(self) -> str:
        """The same code without the fault."""
        return self.sections.get("Use instead", "")

    @property
    def missing(self) -> tuple[str, ...]:
        """The sections that a whole page has and this one lacks or leaves empty."""
        return tuple(title for title in TITLES if not self.sections.get(title, "").strip())

    def __str__(self) -> str:
        parts = [self.summary]
        parts += [f"{title}\n{textwrap.indent(text, '    ')}" for title, text in self.sections.items()]
        return "\n\n".join(parts)
