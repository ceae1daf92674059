"""What an examination found: as text, JSON, SARIF and one HTML page; and the mending of all that can be mended."""

from __future__ import annotations

import html
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

from ..lab.errors import UserError
from ..surgery.receipt import Receipt, shown, unwrap
from .check import EVIDENCE, SEVERITIES, Check, Finding, all_checks
from .page import TITLES, Page
from .probe import CannotRun

__all__ = ["Intended", "NotRun", "Report", "Unfixed", "page_markdown"]

_SHOWN = 4  # names listed in a line
_SARIF_LEVELS = {"error": "error", "warning": "warning", "advice": "note"}


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


@dataclass(frozen=True)
class Unfixed:
    """A finding that `fix` tried to mend and could not, and why."""

    finding: Finding
    why: str


@dataclass
class Report:
    """The findings of an examination, the worst first.

    `print(report)` shows them as text; a notebook shows them drawn. `to_json`, `to_sarif` and `to_html` are for
    programs, for code scanning and for people without Python.

    Arguments:
        subject: what was examined, by its class.
        findings: the faults.
        not_run: checks that could not run, and why.
        intended: findings that are marked as meant, by `nw.intended`.
        ran: codes of the checks that ran.
        model: what was examined; after `fix`, the model that carries every repair.
        receipts: what `fix` did, in order.
        unfixed: what `fix` could not mend, and why.
    """

    subject: str
    findings: list[Finding] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    intended: list[Intended] = field(default_factory=list)
    ran: list[str] = field(default_factory=list)
    model: nn.Module | None = field(default=None, repr=False)
    receipts: list[Receipt] = field(default_factory=list, init=False, repr=False)
    unfixed: list[Unfixed] = field(default_factory=list, init=False, repr=False)

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
        """Mend every finding that has an operation, worst first, each verified by a second look.

        Operations on buffers and modes (`recalibrate`, `freeze`) change the model itself; the others make a copy, and
        what follows works on that copy. Before each operation the check is run again on the model so far: what an
        earlier operation mended too needs none of its own, so an operation that mends several findings runs once.
        Afterwards `report.model` carries every repair; `report.unfixed` lists what could not be mended. To take all
        back: `for receipt in reversed(receipts): receipt.undo()`. The findings stay as they were found; examine
        `report.model` again for what is left.

        Arguments:
            safe_only: leave out the operations that change more than what is at fault.

        Returns: the receipts of this call, in order.
        """
        receipts: list[Receipt] = []
        copied = False  # a finding that cannot look again knows the first model only
        for found in self.findings:
            if not _mends(found, safe_only):
                continue
            try:
                for finding in self._left(found, copied) if receipts else [found]:
                    if _mends(finding, safe_only):
                        receipt = finding.fix()
                        receipts.append(receipt)
                        if self.model is None or unwrap(self.model) is not unwrap(receipt.model):
                            copied, self.model = self.model is not None, receipt.model
            except Exception as error:  # what was mended before stays so, and its receipts must reach the caller
                told = isinstance(error, (CannotRun, RuntimeError, ValueError, TypeError))
                self.unfixed.append(Unfixed(found, str(error) if told else repr(error)))
        self.receipts += receipts
        return receipts

    def _left(self, finding: Finding, copied: bool) -> list[Finding]:
        """What is left of a finding in the model so far, with a repair that works on that model."""
        if finding.again is not None and self.model is not None:
            return finding.again(self.model)[:1]
        if copied:
            raise RuntimeError(
                f"The operation for {finding.code} works on the model that was examined, and an earlier one has made a "
                "copy; examine report.model and fix that report."
            )
        return [finding]

    def summary(self) -> str:
        """One line: how many of what, how many can be mended, how many checks could not run."""
        if self.findings:
            counts = {s: sum(f.severity == s for f in self.findings) for s in SEVERITIES}
            text = "Found " + ", ".join(_count(n, word) for word, n in counts.items() if n)
            fixable, unasked = sum(_mends(f) for f in self.findings), sum(_mends(f, True) for f in self.findings)
            if fixable:
                text += (
                    f" ({fixable} fixable{f', {fixable - unasked} of them on request' if fixable > unasked else ''})"
                )
        else:
            text = "Found no fault" + (f" by {_count(len(self.ran), 'check')}" if self.ran else "")
        if self.intended:
            text += f"; {_count(len(self.intended), 'finding')} marked as intended"
        if self.not_run:
            text += f"; {_count(len(self.not_run), 'check')} could not run"
        return text + "."

    def __str__(self) -> str:
        blocks = [_block(finding) for finding in self.findings]
        tail = [self.summary()]
        tail += [f"  intended: {f.finding.code} {f.finding.name} at {_places(f.finding.where)}: {f.why}"
                 for f in self.intended]  # fmt: skip
        tail += [f"  not run, {why}: {', '.join(checks)}" for why, checks in self._not_run_by_reason().items()]
        tail += [f"  mended: {_mended(receipt)}" for receipt in self.receipts]
        tail += [f"  not mended: {f.finding.code} at {_places(f.finding.where)}: {f.why}" for f in self.unfixed]
        return "\n\n".join([*blocks, "\n".join(tail)])

    def _not_run_by_reason(self) -> dict[str, list[str]]:
        reasons: dict[str, list[str]] = {}
        for check in self.not_run:
            reasons.setdefault(check.why, []).append(f"{check.code} {check.name}")
        return reasons

    def to_json(self) -> dict[str, Any]:
        """The report as JSON's own types: what `json.dumps(…, allow_nan=False)` takes."""
        return {
            "subject": self.subject,
            "ok": self.ok,
            "summary": self.summary(),
            "counts": {severity: sum(f.severity == severity for f in self.findings) for severity in SEVERITIES},
            "findings": [_finding_json(finding) for finding in self.findings],
            "intended": [{**_finding_json(item.finding), "why": item.why} for item in self.intended],
            "not_run": [vars(check) for check in self.not_run],
            "ran": list(self.ran),
            "mended": [_mended(receipt) for receipt in self.receipts],
            "not_mended": [{"code": item.finding.code, "where": list(item.finding.where), "why": item.why}
                           for item in self.unfixed],
            "versions": _versions(),
        }  # fmt: skip

    def to_sarif(self, file: str | Path | None = None, line: int = 1) -> dict[str, Any]:
        """The report as a SARIF 2.1.0 log, for GitHub code scanning and editors.

        Modules are logical locations. Findings marked as intended are suppressed results; checks that could not run
        are notifications.

        Arguments:
            file: the source file that builds the model, relative to the repository; viewers show results there.
            line: the line in it, from 1.
        """
        physical = {}
        if file is not None:
            region = {"startLine": line}
            artifact = {"uri": quote(Path(file).as_posix())}
            physical = {"physicalLocation": {"artifactLocation": artifact, "region": region}}
        marked = [(finding, None) for finding in self.findings] + [(i.finding, i.why) for i in self.intended]
        checks = {check.code: check for check in all_checks() if check.code in {*self.ran, *_codes(self.not_run)}}
        checks |= {finding.code: finding.check for finding, _ in marked}
        rules = {code: at for at, code in enumerate(checks)}
        results = [_result(finding, why, rules[finding.code], physical) for finding, why in marked]
        notes = [
            {"level": "note", "message": {"text": f"{check.name} could not run: {check.why}."},
             "associatedRule": {"id": check.code, **({"index": rules[check.code]} if check.code in rules else {})}}
            for check in self.not_run
        ]  # fmt: skip
        driver = {
            "name": "normwright",
            "semanticVersion": _versions()["normwright"],
            "rules": [_rule(check) for check in checks.values()],
        }
        invocation = {"executionSuccessful": True, "toolExecutionNotifications": notes}
        run = {
            "tool": {"driver": driver},
            "invocations": [invocation],
            "results": results,
            "columnKind": "utf16CodeUnits",
        }
        return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [run]}

    def to_html(self) -> str:
        """The report as one HTML page that needs no network.

        Errors: `UserError` if jinja2 is not installed.
        """
        return self._render("report.html")

    def _repr_html_(self) -> str:
        try:
            return self._render("findings.html", notebook=True)
        except UserError:  # a notebook without jinja2 shows the text
            return f"<pre>{html.escape(str(self))}</pre>"

    def _render(self, template: str, notebook: bool = False) -> str:
        try:
            import jinja2
        except ImportError as error:
            raise UserError(
                "The HTML report needs jinja2, which is not installed: pip install 'normwright[lab]'; "
                "print(report) shows the same as text."
            ) from error
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        environment.filters |= {"number": _number, "place": shown, "page": Page.of, "mended": _mended}
        return environment.get_template(template).render(
            report=self,
            notebook=notebook,
            counts=[(s, _count(sum(f.severity == s for f in self.findings), s)) for s in SEVERITIES],
            reasons=self._not_run_by_reason(),
            versions=_versions(),
            limit=8,  # places shown at once; the others are behind a click
        )


def _mends(finding: Finding, safe_only: bool = False) -> bool:
    return finding.repair is not None and (finding.safe or not safe_only)


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 or word == 'advice' else 's'}"


def _codes(checks: Iterable[NotRun]) -> set[str]:
    return {check.code for check in checks}


def _places(where: tuple[str, ...]) -> str:
    if not where:
        return "(the training loop)"
    more = f" and {len(where) - _SHOWN} more" if len(where) > _SHOWN else ""
    return ", ".join(shown(name) for name in where[:_SHOWN]) + more


def _block(finding: Finding) -> str:
    """A finding in ruff's shape: code, mark and message; the place; the evidence; the help."""
    mark = "" if finding.repair is None else " [fixable]" if finding.safe else " [fixable on request]"
    evidence = finding.evidence if finding.evidence != "advice" else "no measurement"
    numbers = "; ".join(f"{key} {_number(value)}" for key, value in finding.numbers.items())
    return "\n".join(
        [
            f"{finding.code}{mark} {finding.severity}: {finding.message}",
            f"  --> {_places(finding.where)} ({finding.name})",
            f"   |  {evidence}{': ' if numbers else ''}{numbers}",
            f"   |  this would be wrong if: {finding.falsify}",
            f"help: {finding.help}",
        ]
    )


def _mended(receipt: Receipt) -> str:
    return f"{receipt!r}"[len("<Receipt of ") : -1]


def _number(value: Any) -> str:
    """A measured value in one line, to four digits."""
    value = _plain(value)
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        more = f", … {len(value)} in all" if len(value) > _SHOWN else ""
        return f"[{', '.join(map(_number, value[:_SHOWN]))}{more}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_number(item)}" for key, item in value.items()) + "}"
    return str(value)


def _plain(value: Any) -> Any:
    """As JSON can say it; nan and the infinities become their names."""
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _finding_json(finding: Finding) -> dict[str, Any]:
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": finding.severity,
        "evidence": finding.evidence,
        "where": list(finding.where),
        "message": finding.message,
        "numbers": _plain(finding.numbers),
        "falsify": finding.falsify,
        "help": finding.help,
        "source": finding.source,
        "fixable": _mends(finding),
        "safe": finding.safe,
    }


def _result(finding: Finding, why: str | None, rule: int, physical: Mapping[str, Any]) -> dict[str, Any]:
    places = [{"fullyQualifiedName": shown(name), "kind": "module"} for name in finding.where]
    location = {**physical, **({"logicalLocations": places} if places else {})}
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": rule,
        "level": _SARIF_LEVELS[finding.severity],
        "message": {"text": f"{finding.message} {finding.help}"},
        # so that a viewer knows the finding again when the message's numbers change
        "partialFingerprints": {"place/v1": f"{finding.code}:{','.join(finding.where)}"},
        "properties": {
            "evidence": finding.evidence,
            "numbers": _plain(finding.numbers),
            "falsify": finding.falsify,
            "fixable": _mends(finding),
        },
    }
    if location:
        result["locations"] = [location]
    if why is not None:
        result["suppressions"] = [{"kind": "inSource", "justification": why}]
    return result


def _rule(check: type[Check]) -> dict[str, Any]:
    """A check as a SARIF rule: its page as plain text and as Markdown."""
    page = Page.of(check)
    rule: dict[str, Any] = {
        "id": check.code,
        "name": check.name,
        "shortDescription": {"text": page.summary or check.name},
        "defaultConfiguration": {"level": _SARIF_LEVELS[check.severity]},
        "properties": {"evidence": check.evidence, "tags": ["normalization"]},
    }
    if page.sections:
        text = "\n\n".join(f"{title}\n{page.sections[title]}" for title in TITLES if page.sections.get(title))
        rule["fullDescription"] = {"text": page.sections.get("What it does") or page.summary}
        rule["help"] = {"text": text, "markdown": page_markdown(check)}
    return rule


def page_markdown(check: Any) -> str:
    """The page of a check, or of a rule of the linter, as Markdown; code stands in fences."""
    page = Page.of(check)
    facts = [check.severity, getattr(check, "evidence", "from the source")]
    facts += [f"needs {' and '.join(check.needs)}"] if getattr(check, "needs", ()) else []
    parts = [f"# {check.code}: {check.name}", page.summary, f"*{', '.join(dict.fromkeys(facts))}*"]
    for title, text in page.sections.items():
        fenced = title in ("Example", "Use instead")
        parts += [f"## {title}", f"```python\n{text}\n```" if fenced else text]
    return "\n\n".join(part for part in parts if part) + "\n"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"normwright": version("normwright"), "torch": torch.__version__, "python": platform.python_version()}
