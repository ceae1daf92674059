"""The doctor for the command line: what `normwright doctor` and `normwright check` do."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from ..lab.errors import UserError
from ..lab.files import atomic_write
from ..surgery.checkpoint import named_object, read, refuse_existing, write
from .check import all_checks
from .diagnose import diagnose
from .probe import CannotRun, Subject
from .report import Report, page_markdown

__all__ = ["FORMATS", "Examination", "drawn", "examine", "page_of", "pages", "write_markdown"]

FORMATS = ("text", "json", "sarif", "html")


@dataclass(frozen=True)
class Examination:
    """What is asked of `examine`, in the command line's words.

    Arguments:
        model: `FILE.py:NAME` of a function without arguments that returns the network, or of the network.
        inputs, targets: `FILE.py:NAME` of a batch, or of a function that returns one.
        loss: `FILE.py:NAME` of `loss(output, targets)`, or of a class of such.
        optimizer: `FILE.py:NAME` of a function of the model that returns its optimizer.
        loader: `FILE.py:NAME` of batches, or of a function that returns them.
        checkpoint: a file with the state dict that the network is used with.
        select, ignore: codes or their beginnings.
        fix: the file to write the mended network's state dict to; None mends nothing.
        unsafe: mend also by operations that change more than what is at fault.
        force: write over `fix`.
    """

    model: str
    inputs: str | None = None
    targets: str | None = None
    loss: str | None = None
    optimizer: str | None = None
    loader: str | None = None
    checkpoint: Path | None = None
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    fix: Path | None = None
    unsafe: bool = False
    force: bool = False
    notes: list[str] = field(default_factory=list, compare=False)  # sentences for the user, filled by `examine`

    @property
    def file(self) -> str | None:
        """The source file that builds the network, if one is named."""
        where = self.model.rpartition(":")[0]
        return where if where.endswith(".py") else None


def examine(asked: Examination) -> Report:
    """Build the network, examine it, and with `fix` mend it, write it, and examine it again.

    Errors: `UserError` for what the user can mend.
    """
    if asked.fix is not None:
        refuse_existing(asked.fix, asked.force)
    model = _made(asked.model, "the model", lambda value: isinstance(value, nn.Module))
    if not isinstance(model, nn.Module):
        raise UserError(f"The doctor examines an nn.Module, and {asked.model} gave a {type(model).__name__}.")
    state = None if asked.checkpoint is None else _loaded(model, asked)
    tensors = (Tensor, Mapping, tuple, list)
    given = {
        "inputs": asked.inputs and _made(asked.inputs, "--inputs", lambda value: isinstance(value, tensors)),
        "targets": asked.targets and _made(asked.targets, "--targets", lambda value: isinstance(value, tensors)),
        "loader": asked.loader and _made(asked.loader, "--loader", lambda value: isinstance(value, Iterable)),
        "loss": asked.loss and _made(asked.loss, "--loss", lambda value: not inspect.isclass(value)),
    }
    if given["inputs"] is not None or given["loader"] is not None:
        try:  # or every check that needs a run would be left out, and CI would read that as health
            Subject(model, given["inputs"], loader=given["loader"]).forward()
        except CannotRun as reason:
            raise UserError(f"{asked.model} does not run on {asked.inputs or asked.loader}: {reason}") from reason
    report = _report(asked, model, state, given)
    if asked.fix is None:
        return report
    receipts = report.fix(safe_only=not asked.unsafe)
    asked.notes.extend(f"Mended: {repr(r)[len('<Receipt of ') : -1]}." for r in receipts)
    asked.notes.extend(f"Not mended, {item.finding.code}: {item.why}" for item in report.unfixed)
    mended = report.model
    assert mended is not None
    expected = set(model.state_dict())
    write(asked.fix, mended.state_dict(), {})
    asked.notes.append(f"Wrote {asked.fix}, the state dict of the mended network.")
    if changed := sorted(expected ^ set(mended.state_dict())):
        asked.notes.append(f"Its keys are not those of {asked.model}; they differ in {', '.join(changed)}.")
    return _report(asked, mended, None, given)


def _report(asked: Examination, model: nn.Module, state: Any, given: Mapping[str, Any]) -> Report:
    optimizer = None
    if asked.optimizer is not None:
        make = named_object(asked.optimizer, "--optimizer")
        optimizer = make if isinstance(make, torch.optim.Optimizer) else _called(make, asked.optimizer, model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise UserError(f"--optimizer names a function of the model that returns its optimizer; {asked.optimizer} "
                            f"gave a {type(optimizer).__name__}.")  # fmt: skip
    try:
        return diagnose(
            model, **given, optimizer=optimizer, checkpoint=state, select=asked.select, ignore=asked.ignore
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error


def _called(make: Any, text: str, *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except (Exception, SystemExit) as error:
        raise UserError(f"{text} raised {type(error).__name__}: {' '.join(str(error).split())}") from error


def _made(text: str, option: str, is_done: Callable[[Any], bool]) -> Any:
    """The named object, or what it returns when called without arguments."""
    value = named_object(text, option)
    return value if is_done(value) or not callable(value) else _called(value, f"{option}: {text}")


def _loaded(model: nn.Module, asked: Examination) -> dict[str, Any]:
    """Load the checkpoint as far as its keys fit, note what does not, and return its state dict."""
    assert asked.checkpoint is not None
    state = read(asked.checkpoint).state
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state):
            consume_prefix_in_state_dict_if_present(state, prefix)
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise UserError(f"{asked.checkpoint} does not fit {asked.model}: {text}") from error
    for what, keys in (("lacks", missing), ("has what the network has not:", unexpected)):
        if keys:
            asked.notes.append(f"{asked.checkpoint} {what} {', '.join(keys)}.")
    return state


def drawn(report: Report, format: str, file: str | None = None) -> str:
    """The report in one of `FORMATS`."""
    if format == "json":
        return json.dumps(report.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
    if format == "sarif":
        return json.dumps(report.to_sarif(file), indent=2, ensure_ascii=False, allow_nan=False)
    return report.to_html() if format == "html" else str(report)


def pages() -> dict[str, Any]:
    """Every check and every rule of the linter, by code: what has a page."""
    from .lint.rule import all_rules

    return {each.code: each for each in sorted([*all_checks(), *all_rules()], key=lambda each: each.code)}


def page_of(name: str) -> Any:
    """The check or rule with this code or name.

    Errors: `UserError` if there is none.
    """
    found = pages()
    for check in found.values():
        if name.upper() == check.code or name == check.name:
            return check
    near = [code for code in found if code.startswith(name.upper()[:3])] or list(found)
    raise UserError(f"No check is called {name!r}; there are {', '.join(near)}. `normwright check --list` says what.")


def write_markdown(folder: Path) -> list[Path]:
    """Write the page of every check as `CODE.md`, and `index.md` with a table of them; returns the files."""
    found = pages()
    rows = [f"| [{code}]({code}.md) | {check.name} | {check.severity} |" for code, check in found.items()]
    files = {f"{code}.md": page_markdown(check) for code, check in found.items()}
    files["index.md"] = "\n".join(["# Checks", "", "| code | fault | severity |", "|---|---|---|", *rows]) + "\n"
    for name, text in files.items():
        atomic_write(folder / name, [text.encode()])
    return [folder / name for name in files]
