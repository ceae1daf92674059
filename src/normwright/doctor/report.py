"""What an examination found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..surgery.receipt import Receipt
from .check import EVIDENCE, SEVERITIES, Finding

__all__ = ["Intended", "NotRun", "Report"]


@dataclass(frozen=True)
class NotRun:
    """A check that could not run, and why."""

    code: str
    name: str
    why: str


@dataclass(frozen=True)
class Intended:
    """A finding that is marked as meant, and the reason given."""

    finding: Finding
    why: str


@dataclass
class Report:
    """The findings of an examination, the worst first.

    Arguments:
        subject: what was examined, by its class.
        findings: the faults.
        not_run: checks that could not run, and why.
        intended: findings that are marked as meant, by `nw.intended`.
    """

    subject: str
    findings: list[Finding] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    intended: list[Intended] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether there is no error and no warning; advice does not count."""
        return not any(finding.severity in ("error", "warning") for finding in self.findings)

    def sort(self) -> None:
        """Order the findings: errors, warnings, advice; the better evidence first; then by code and place."""
        self.findings.sort(
            key=lambda f: (SEVERITIES.index(f.severity), EVIDENCE.index(f.evidence), f.code, f.where)
        )  # fmt: skip

    def fix(self, safe_only: bool = True) -> list[Receipt]:
        """Mend every finding that has an operation (only the safe ones unless told otherwise), worst first.

        An operation that mends several findings at once runs once. Returns the receipts, in order; those of operations
        on buffers and modes changed the model itself, the others hold a copy in `.model`.
        """
        raise NotImplementedError

    def __str__(self) -> str:
        lines = [f"{f.code} {f.name} {', '.join(f.where)}: {f.message}" for f in self.findings]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON's own types."""
        raise NotImplementedError
