from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery.receipt import tensors_in
from ..axes import FEATURES, PLACES, SEQUENCE, NormAxes, axes_at_norms
from ..check import Check, Finding
from ..probe import Subject
from ..values import by_mark
from .axes_sequence_as_channels import at_the_place

__all__ = ["LayerNormOverTokens"]

# of the output's size: float32's rounding is 1e-6, what a statistic carries over is the change itself
_NOTHING, _SOMETHING = 1e-3, 1e-2


class LayerNormOverTokens(Check):
    """A layer norm takes its statistics over the positions or over the batch.

    What it does
        Follows in one run which axis holds the features, and looks at the trailing axes that each LayerNorm normalizes.
        Found are three things, each tried: only places are normalized and the features are another axis (an offset for
        each feature leaves the output the same); a sequence is normalized together with its features (another token
        at one position moves the outputs at all others); all axes are normalized, the batch too (with another sample
        in the batch the model's outputs for the rest move, and without the norm they do not).

    Why is this bad
        A layer norm is to make each token's features comparable, alone. Over positions it erases each feature's level,
        makes the length fixed, lets padding and, in a causal model, the future into every output; over the batch, a
        sample's result depends on who came with it.

    Example
        model = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3), torch.nn.LayerNorm(18), torch.nn.ReLU())
        inputs = torch.randn(16, 4, 20)

    Use instead
        model = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3), nw.ChannelNorm(8), torch.nn.ReLU())
        inputs = torch.randn(16, 4, 20)

    Fix safety
        By hand: transpose so that the features are last, or `nw.ChannelNorm(C)` for (N, C, L) and (N, C, H, W).

    References
        Ba, Kiros & Hinton 2016, Layer Normalization, arXiv:1607.06450, section 3.1; torch.nn.LayerNorm,
        normalized_shape.
    """

    code = "NW302"
    name = "layer-norm-over-tokens"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        calls, _ = axes_at_norms(subject)
        found: dict[Any, tuple[NormAxes, float, str]] = {}
        for call in calls:
            # a subclass may have its own idea of the axes, which the experiments tell
            known = isinstance(call.module, nn.LayerNorm) and call.finished and call.module not in found
            if known and (fault := _fault(subject, call)) is not None:
                found[call.module] = (call, *fault)
        for kind in dict.fromkeys(kind for _, _, kind in found.values()):
            of_kind = [call for call, _, what in found.values() if what == kind]
            for group in by_mark(subject, self.code, of_kind):
                call = group[0]
                shape, count = tuple(call.x.shape), len(call.module.normalized_shape)  # type: ignore[arg-type]
                axes = ", ".join(str(d) for d in range(len(shape) - count, len(shape)))
                more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
                text, number = _TEXTS[kind]
                yield self.finding(
                    [one.name for one in group],
                    f"{subject.name(call.module)}{more} normalizes axis {axes} of an input of shape {shape}: "
                    + text.format(found[call.module][1]),
                    help="Normalize the features alone: LayerNorm(C) with the features last, or nw.ChannelNorm(C) with "
                    "the features on axis 1.",
                    falsify="The same experiment with the opposite outcome.",
                    numbers={"shape": shape, number: found[call.module][1]},
                    severity="error" if kind == "batch" else None,
                )


_TEXTS = {
    "places": ("places, and no features; an offset of each feature moves its output by {:.1g}.", "output_change"),
    "tokens": (
        "positions of a sequence with their features; another token at one moves the other outputs by {:.2g}.",
        "change_at_other_positions",
    ),
    "batch": (
        "the batch too; another sample moves the model's outputs for the others by {:.2g}, and by nothing without the "
        "norm.",
        "change_of_other_samples",
    ),
}


def _fault(subject: Subject, call: NormAxes) -> tuple[float, str] | None:
    """What the norm does wrong, and the number that shows it."""
    count = len(call.module.normalized_shape)  # type: ignore[arg-type]
    start = call.x.dim() - count
    over, kept = call.roles[start:], call.roles[1:start]
    if start == 0 and call.x.dim() > 1:
        moved = _other_samples(subject, call)
        return (moved, "batch") if moved is not None and moved > _SOMETHING else None
    if FEATURES in kept and {role for role in over if role != FEATURES} == set(over) <= {PLACES, SEQUENCE}:
        if any(call.x.size(start + d) == 1 for d in range(count)):
            return None
        axis = 1 + kept.index(FEATURES)
        shape = [call.x.size(d) if d == axis else 1 for d in range(call.x.dim())]
        offset = torch.linspace(-1, 1, call.x.size(axis), dtype=torch.float64).view(shape).to(call.x)
        moved = _moved(subject, call, call.x + offset * call.x.std(), None)
        return (moved, "places") if moved < _NOTHING else None
    if count > 1 and SEQUENCE in over and FEATURES in over:
        axis = start + over.index(SEQUENCE)
        other = call.x.clone()
        other.select(axis, 0).copy_(2 * call.x.select(axis, 0).roll(1, -1) + 1)
        moved = _moved(subject, call, other, axis)
        return (moved, "tokens") if call.x.size(axis) > 1 and moved > _SOMETHING else None
    return None


def _moved(subject: Subject, call: NormAxes, other: Tensor, axis: int | None) -> float:
    """How far the norm's output moves with another input, relative to its size; without position 0 of `axis`."""
    before, after = at_the_place(subject, call.module, call.x, other)
    size = float(before.square().mean().sqrt())
    if axis is not None:
        before, after = (t.narrow(axis, 1, t.size(axis) - 1) for t in (before, after))
    return float((after - before).abs().max()) / max(size, 1e-12)


def _other_samples(subject: Subject, call: NormAxes) -> float | None:
    """How far the other samples' outputs move when the first is another; None if they also do without the norm."""
    batch = subject.batch()
    samples = call.x.size(0)
    if samples < 2:
        return None
    moved = []
    for bypassed in (True, False):
        outputs = []
        for given in (batch, _swapped(batch, samples)):
            with subject.experiment() as model, torch.no_grad():
                for module in model.modules():
                    module.training = False
                if bypassed:
                    call.module.register_forward_hook(lambda module, args, y: args[0])
                found = tensors_in(subject.run(given))
                outputs.append([t[1:].double() for t in found if t.dim() and t.size(0) == samples])
        if not outputs[0]:
            return None
        size = max(float(t.abs().max()) for t in outputs[0])
        largest = max(float((a - b).abs().max()) for a, b in zip(*outputs, strict=True))
        moved.append(largest / max(size, 1e-12))
    return moved[1] if moved[0] < _NOTHING else None


def _swapped(batch: Any, samples: int) -> Any:
    """A copy of the batch, with another sample in place of the first: three times the second, or the second itself."""
    other = copy.deepcopy(batch, {id(t): t.detach().clone() for t in tensors_in(batch)})
    for t in tensors_in(other):
        if t.dim() and t.size(0) == samples:
            t[0] = t[1] * 3 if t.is_floating_point() else t[1]
    return other
