"""`diagnose(model, …)`: every check on one model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..surgery.receipt import Forward, unwrap
from .check import Check, Finding, all_checks
from .probe import CannotRun, Subject, preserved
from .report import Intended, NotRun, Report

__all__ = ["chosen", "diagnose"]


def diagnose(
    model: nn.Module,
    inputs: Any = None,
    *,
    targets: Any = None,
    loss: Callable[..., Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loader: Iterable[Any] | None = None,
    checkpoint: Any = None,
    forward: Forward | None = None,
    select: Collection[str] = (),
    ignore: Collection[str] = (),
) -> Report:
    """Look for everything that is wrong with the normalization in a model, and prove or measure it.

    Each check that can run runs; the others are listed in `report.not_run` with the reason. Checks run the model, in
    training and in evaluation mode, change it, and put everything back: afterwards weights, buffers, gradients, modes,
    hooks, plain attributes and random states are bit for bit what they were, also when the model raises.

    Arguments:
        model: any module; DDP and `torch.compile` are looked through. Its present mode is what it is used in.
        inputs: one batch as the model is called with: a tensor, a mapping (keyword arguments), or a tuple whose first
            element is the input.
        targets: what `loss` takes beside the output.
        loss: `loss(output, targets)`, or `loss(output)` without targets.
        optimizer: the one that trains the model: weight decay and stale parameters are looked at.
        loader: the training data, an iterable of batches that can be read again; running statistics are compared
            with a few batches of it. Its first batch is the inputs, if none are given.
        checkpoint: a state dict, or a path to one, that the model is or will be loaded from.
        forward: `forward(model, batch)`, in place of the rules for inputs.
        select: codes or their beginnings (`"NW1"`); only these checks run.
        ignore: likewise; these do not.

    Returns: a `Report`: `.findings`, the worst first; `.ok`; `.not_run`; `print(report)`; `.fix()`.

    Errors: `TypeError` if `model` is no module; `ValueError` for a code that no check has.

    Example:
        >>> import torch, normwright as nw
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8, momentum=0.0))
        >>> report = nw.diagnose(model, torch.randn(32, 4))
        >>> report.ok
        False
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"diagnose looks at a torch.nn.Module; got {type(model).__name__}. Pass the model itself, not its class or "
            "its state dict (that is checkpoint=)."
        )
    subject = Subject(
        model, inputs, targets=targets, loss=loss, optimizer=optimizer, loader=loader, checkpoint=checkpoint,
        forward=forward,
    )  # fmt: skip
    report = Report(type(subject.model).__name__, model=model)
    with preserved(subject.model):
        for check in chosen(select, ignore):
            if check.find is Check.find:  # it watches training
                continue
            missing = [need for need in check.needs if not subject.has(need)]
            if missing:
                report.not_run.append(NotRun(check.code, check.name, f"it needs {' and '.join(missing)}"))
                continue
            try:
                found = [_verifiable(finding, subject) for finding in check().find(subject)]
            except CannotRun as reason:
                report.not_run.append(NotRun(check.code, check.name, str(reason)))
                continue
            except Exception as error:  # most often of the loss, on what a check made of the output
                text = " ".join(str(error).split())
                report.not_run.append(NotRun(check.code, check.name, f"it raised {type(error).__name__}: {text:.200}"))
                continue
            report.ran.append(check.code)
            for finding in found:
                add(report, finding, subject)
    report.sort()
    return report


def chosen(select: Collection[str] = (), ignore: Collection[str] = ()) -> list[type[Check]]:
    """The checks whose code begins with one of `select` (all if empty) and with none of `ignore`."""
    select, ignore = ((text,) if isinstance(text, str) else tuple(text) for text in (select, ignore))
    for text in (*select, *ignore):
        if not any(check.code.startswith(text) for check in all_checks()):
            raise ValueError(f"select= and ignore= name checks by code or its beginning; no check has {text!r}.")
    return [
        c
        for c in all_checks()
        if (not select or c.code.startswith(select)) and not (ignore and c.code.startswith(ignore))
    ]


def add(report: Report, finding: Finding, subject: Subject) -> None:
    """Put a finding into the report, or among the intended ones if it is marked as meant."""
    why = _intended(finding, subject)
    if why is None:
        report.findings.append(finding)
    else:
        report.intended.append(Intended(finding, why))


def _intended(finding: Finding, subject: Subject) -> str | None:
    """The reason by which this finding is meant, at its module or one around it."""
    for name in finding.where or ("",):
        parts = name.split(".") if name else []
        for end in range(len(parts), -1, -1):
            module = subject.modules.get(".".join(parts[:end]))
            if module is not None and finding.code in (marks := getattr(module, "nw_intended", {})):
                return marks[finding.code]
    return None


def _verifiable(finding: Finding, subject: Subject) -> Finding:
    """The finding with a second look: the same check on another model."""
    if finding.repair is None:
        return finding

    def again(model: nn.Module) -> list[Finding]:
        same = subject.model is unwrap(model)
        other = Subject(
            model, subject.inputs, targets=subject.targets, loss=subject.loss, loader=subject.loader,
            checkpoint=subject.checkpoint, forward=subject._forward, optimizer=subject.optimizer if same else None,
        )  # fmt: skip
        missing = [need for need in finding.check.needs if not other.has(need)]
        if missing:
            raise CannotRun(f"the repaired copy has no {' and '.join(missing)} to look at")
        with preserved(other.model):
            found = [_verifiable(each, other) for each in finding.check().find(other)]
        return [each for each in found if set(each.where) & set(finding.where) or each.where == finding.where]

    return replace(finding, again=again)
