from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ... import surgery
from ..check import Check, Finding
from ..probe import Subject
from ..values import meetings, require_calls

__all__ = ["FrozenWithLiveStatistics"]


class FrozenWithLiveStatistics(Check):
    """The parameters of a part are frozen, and its running statistics still move.

    What it does
        Runs a step of training, with the modes as they are, and looks at the layers with running statistics that
        nothing learns before or in: no gradient reaches their input, and they, or all of the part around them, have
        parameters with requires_grad=False alone. If the step changed their running statistics, they are found. A part
        that mirrors one that learns, as a momentum encoder or a target network does, is left alone.

    Why is this bad
        `requires_grad=False` stops the optimizer and nothing else. In training mode the frozen part normalizes by each
        batch, and its running statistics drift to the new data while the weights that they belong to stay: features
        that were to be fixed change, in training by the batch and at evaluation by the epoch.

    Example
        backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        backbone.requires_grad_(False)
        model = torch.nn.Sequential(backbone, torch.nn.Flatten(), torch.nn.Linear(288, 2))
        inputs = torch.randn(16, 3, 8, 8)

    Use instead
        backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        nw.recalibrate(backbone, [torch.randn(16, 3, 8, 8) for _ in range(20)])  # or statistics of a pretrained one
        backbone.requires_grad_(False)
        nw.freeze(backbone)
        model = torch.nn.Sequential(backbone, torch.nn.Flatten(), torch.nn.Linear(288, 2))
        inputs = torch.randn(16, 3, 8, 8)

    Fix safety
        Safe: `nw.freeze(model, "statistics")` puts the named layers into evaluation mode and keeps them there through
        `model.train()`. Statistics that have drifted already stay as they are; load them again from the checkpoint.

    References
        torch.nn.Module.requires_grad_ and train; Wu & Johnson 2021, arXiv:2105.07576, section 5.
    """

    code = "NW401"
    name = "frozen-with-live-statistics"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        if not subject.model.training:
            return
        tracked = subject.tracked()
        parts = {name: _frozen_part(subject, name) for name in tracked}
        frozen = {name for name, part in parts.items() if part is not None and not _mirrors(subject, part)}
        if not frozen:
            return
        met, raised = meetings(subject, gradients=True)
        require_calls(met, raised)
        reached = {meeting.name for meeting in met if meeting.name in frozen}
        fixed = sorted(reached - {meeting.name for meeting in met if meeting.learns})
        if not fixed:
            return
        moved = {name: move for name, move in _moves(subject, fixed).items() if move > 0}
        if not moved:
            return
        names = sorted(moved, key=lambda name: -moved[name])
        model = subject.model
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        yield self.finding(
            names,
            f"{subject.name(tracked[names[0]])}{more} is frozen, and one step of training moves its running "
            f"statistics by up to {moved[names[0]]:.2g}, in running deviations.",
            help="nw.freeze(model, 'statistics'), or put the layers into evaluation mode after every model.train().",
            falsify="A training step after which the running statistics are bit for bit the same.",
            numbers={"largest_move_in_deviations": moved[names[0]], "layers": len(names)},
            repair=lambda: surgery.freeze(model, "statistics", only=names),
        )


def _frozen_part(subject: Subject, name: str) -> str | None:
    """The outermost module around this layer that has parameters, none of which learns; None if there is no such."""
    parts = name.split(".") if name else []
    around = [".".join(parts[:end]) for end in range(len(parts), -1, -1)]
    part = None
    for place in around:
        parameters = list(subject.modules[place].parameters())
        if any(parameter.requires_grad for parameter in parameters):
            break
        if parameters:
            part = place
    return part


def _mirrors(subject: Subject, part: str) -> bool:
    """Whether a part that learns has the same parameters by name and shape, or the frozen one is inside such a copy."""
    parts = part.split(".") if part else []
    shapes = _shapes(subject.modules[part])
    own = set(subject.modules[part].modules())
    others = (module for module in subject.modules.values() if module not in own)
    # a single layer, whose like is everywhere, says nothing
    several = len([m for m in subject.modules[part].modules() if m._parameters]) > 1 or not parts
    return several and any(
        any(p.requires_grad for p in other.parameters()) and _shapes(other) == shapes for other in others
    )


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in module.named_parameters()]


def _moves(subject: Subject, names: list[str]) -> dict[str, float]:
    """How far one step of training moves the running statistics of these layers at most, in running deviations."""
    with subject.experiment(), torch.no_grad():
        before = {name: _statistics(subject.modules[name]) for name in names}
        subject.run()
        after = {name: _statistics(subject.modules[name]) for name in names}
    moves = {}
    for name, was in before.items():
        deviation = was["running_var"].clamp(min=1e-12).sqrt() if "running_var" in was else 1.0
        moves[name] = max(float(((after[name][key] - was[key]).abs() / deviation).max()) for key in was)
    return moves


def _statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    buffers = {key: module._buffers.get(key) for key in ("running_mean", "running_var")}
    return {key: buffer.clone() for key, buffer in buffers.items() if isinstance(buffer, torch.Tensor)}
