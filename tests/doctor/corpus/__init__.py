"""Pairs of small training programs, one with a fault that people met in public and its mended twin.

Each file names the public thread that it is modelled on, and was written from the thread alone. It defines `CODES`,
the codes under which the fault may be reported, and `buggy()` and `fixed()`, which return the arguments of
`nw.diagnose`, or the report of `nw.watch`, or the source of a program for the linter. A fault that the doctor does not
find also has `MISSED`, why not.
"""

from __future__ import annotations

import importlib
import pkgutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import normwright as nw
from normwright.doctor.lint import lint

__all__ = ["Found", "Pair", "pairs"]

_HELPERS = {"common"}


@dataclass(frozen=True)
class Found:
    """One finding, whichever part of the doctor made it."""

    code: str
    severity: str
    where: str
    message: str


@dataclass(frozen=True)
class Pair:
    """A fault and its mended twin."""

    name: str
    module: ModuleType

    @property
    def codes(self) -> set[str]:
        return self.module.CODES

    @property
    def missed(self) -> str | None:
        return getattr(self.module, "MISSED", None)

    @property
    def buggy(self) -> list[Found]:
        return findings(self.module.buggy)

    @property
    def fixed(self) -> list[Found]:
        return findings(self.module.fixed)


def pairs() -> list[Pair]:
    """Every pair, by file name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if info.name not in _HELPERS)
    return [Pair(name, importlib.import_module(f"{__name__}.{name}")) for name in names]


def findings(program: Callable[[], Any]) -> list[Found]:
    """What the doctor finds in what a program returns; the program is trained from the same seed each time."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch itself warns of some faults
        made = program()
        if isinstance(made, str):
            return linted(made)
        report = nw.diagnose(**made) if isinstance(made, dict) else made
    found = [Found(f.code, f.severity, ", ".join(f.where), f.message) for f in report.findings]
    # a check that broke is as bad as a false alarm
    return found + [Found("broken", "error", c.code, c.why) for c in report.not_run if c.why.startswith("it raised")]


def linted(source: str) -> list[Found]:
    """What the linter finds in a program's source."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.py")
        path.write_text(source, encoding="utf-8")
        return [Found(p.code, p.severity, f"line {p.line}", p.message) for p in lint([path]).problems]
