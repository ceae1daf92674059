"""What a check is, and what it finds."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from . import checks
from .probe import CannotRun

if TYPE_CHECKING:
    from ..surgery import Receipt
    from .probe import Subject
    from .watch import Log

__all__ = ["EVIDENCE", "SEVERITIES", "Check", "Finding", "all_checks"]

SEVERITIES = ("error", "warning", "advice")
EVIDENCE = ("proved", "measured", "advice")


@dataclass(frozen=True, eq=False)
class Finding:
    """One fault at one place, with the number that shows it.

    Arguments:
        check: the check that found it; `code`, `name` and `source` are the check's.
        severity: `"error"` (results are wrong), `"warning"` (probably not what was meant) or `"advice"`.
        evidence: `"proved"` (a counterfactual was run), `"measured"` (a number against a threshold), `"advice"`.
        where: qualified names of the modules, the first the offending one; empty for the training loop or the whole.
        message: one sentence that names the layer and shows the number.
        help: what to do.
        falsify: the observation that would show this finding to be wrong.
        numbers: what was measured, by name, with units in the names.
        repair: the operation of surgery that mends it, or None; it returns a `Receipt`.
        safe: whether the repair leaves alone all that is not at fault, so that `report.fix()` may make it unasked.
        again: the same check on another model: what it finds there at the same place. It raises `CannotRun` where
            the check cannot look.
    """

    check: type[Check]
    severity: str
    evidence: str
    where: tuple[str, ...]
    message: str
    help: str
    falsify: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    repair: Callable[[], Receipt] | None = None
    safe: bool = True
    again: Callable[[Any], list[Finding]] | None = None

    @property
    def code(self) -> str:
        return self.check.code

    @property
    def name(self) -> str:
        return self.check.name

    @property
    def source(self) -> str:
        """Where the fault is described: the References of the check's page."""
        return self.check.section("References")

    def fix(self) -> Receipt:
        """Mend the fault by its operation, look again, and return the `Receipt`.

        Errors: `RuntimeError` if no operation mends it, or if the second look still finds it (then it is undone).
        """
        if self.repair is None:
            raise RuntimeError(f"{self.code} has no operation that mends it: {self.help}")
        receipt = self.repair()
        try:
            left = None if self.again is None else self.again(receipt.model)
        except CannotRun as reason:
            receipt.facts["verified"] = f"no: {reason}"
            return receipt
        if left:
            if receipt.undo_with is not None:
                receipt.undo()
            raise RuntimeError(
                f"{receipt.operation} did not remove {self.code} ({self.name}) at "
                f"{', '.join(self.where) or 'the model'}{', and was undone' if receipt.undone else ''}. Mend it by "
                f"hand: {self.help}"
            )
        receipt.facts["verified"] = "no: the check watches training" if left is None else f"{self.code} is gone"
        return receipt


class Check:
    """One fault that a model can have. Subclass it in a file of its own under `doctor/checks/`.

    The docstring is the page: a first sentence, then the sections What it does, Why is this bad, Example, Use instead,
    Fix safety, References, each a line of its own followed by an indented block. Example and Use instead are run by
    the tests: they define `model`, and what else `diagnose` takes by its name (`inputs`, `targets`, `loss`,
    `optimizer`, `loader`, `checkpoint`), or `report` itself; Example must fire this check, Use instead no check.

    Class attributes: `code` (`"NW101"`), `name` (reads as the fault, `"stale-running-statistics"`), `severity`,
    `evidence`, and `needs`: those of `diagnose`'s arguments without which it cannot run.
    """

    code: ClassVar[str]
    name: ClassVar[str]
    severity: ClassVar[str]
    evidence: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()

    def find(self, subject: Subject) -> Iterable[Finding]:
        """What this check finds in a model at rest. Raise `CannotRun(why)` where it cannot look."""
        return ()

    def watched(self, log: Log) -> Iterable[Finding]:
        """What this check finds in the steps of a training run that was watched."""
        return ()

    @classmethod
    def section(cls, title: str) -> str:
        """The text of one section of the page, without its indentation; empty if there is none."""
        from .page import Page

        return Page.of(cls).sections.get(title, "")

    def finding(
        self,
        where: str | Iterable[str],
        message: str,
        *,
        help: str,
        falsify: str,
        numbers: Mapping[str, Any] | None = None,
        repair: Callable[[], Receipt] | None = None,
        safe: bool = True,
        severity: str | None = None,
        evidence: str | None = None,
    ) -> Finding:
        """A finding of this check, with the check's own severity and evidence unless told otherwise."""
        names = (where,) if isinstance(where, str) else tuple(where)
        return Finding(
            type(self), severity or self.severity, evidence or self.evidence, names, message, help, falsify,
            numbers or {}, repair, safe,
        )  # fmt: skip


@cache
def all_checks() -> tuple[type[Check], ...]:
    """Every check, by code."""
    found: dict[str, type[Check]] = {}
    for info in pkgutil.iter_modules(checks.__path__):
        module = importlib.import_module(f"{checks.__name__}.{info.name}")
        for check in _defined(module):
            if check.code in found:
                raise RuntimeError(f"A code names one check; {check.code} is {found[check.code]} and {check}.")
            found[check.code] = check
    return tuple(found[code] for code in sorted(found))


def _defined(module: Any) -> Iterator[type[Check]]:
    for value in vars(module).values():
        ours = isinstance(value, type) and issubclass(value, Check) and value.__module__ == module.__name__
        if ours and "code" in vars(value):
            yield value
