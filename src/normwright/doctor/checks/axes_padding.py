from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...surgery.receipt import tensors_in
from ..check import Check, Finding
from ..probe import Subject
from ..values import Meeting, by_mark, meetings, trained, training_batch, training_modes, uses_batch

__all__ = ["PaddingInStatistics", "valid_positions"]

# Of the outputs' size at valid positions. Rounding is 1e-6; what moves by less than a hundredth is not worth a change.
_MOVED = 0.01
# Padding of less than a twentieth of all positions is left alone.
_SHARE = 0.05


class PaddingInStatistics(Check):
    """The padding of shorter sequences enters the statistics.

    What it does
        Finds which positions of the inputs are padding: from a mask or lengths among the inputs, or from ends of one
        value, of different lengths. Each batch, instance or group norm over such a sequence is then called alone, on
        its input and on one with twice the length, all of it padding as that which is there. Norms whose outputs at the
        valid positions move are found.

    Why is this bad
        Mean and variance are drawn towards what stands at padded positions. A sequence's result depends on how long the
        longest of its batch was, in training and, for norms within a sample, at evaluation, and a batch norm's running
        statistics are those of padded data.

    Example
        model = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 1, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        lengths = torch.arange(5, 37)
        inputs = 1 + torch.randn(32, 4, 36)
        inputs = inputs * (torch.arange(36) < lengths[:, None])[:, None]

    Use instead
        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = torch.nn.Conv1d(4, 8, 1, bias=False)
                self.norm = nw.BatchNorm1d(8, act="relu")

            def forward(self, x):
                return self.norm(self.conv(x), mask=(x != 0).any(1))

        model = Model()
        lengths = torch.arange(5, 37)
        inputs = 1 + torch.randn(32, 4, 36)
        inputs = inputs * (torch.arange(36) < lengths[:, None])[:, None]

    Fix safety
        By hand: the layers of this package take `mask=`, the valid positions; or normalize within each position
        (LayerNorm over the features).

    References
        Shen et al. 2020, PowerNorm, arXiv:2003.07845, on batch statistics of padded text; Collobert et al. 2019,
        wav2letter++, on padding in normalized speech.
    """

    code = "NW303"
    name = "padding-in-statistics"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        valid = valid_positions(training_batch(subject), subject._forward is not None)
        if valid is None or float((~valid).double().mean()) < _SHARE:
            return
        met, _ = meetings(subject)
        moved: dict[nn.Module, tuple[Meeting, float]] = {}
        for meeting in met:
            if meeting.module not in moved and meeting.finished and meeting.kwargs.get("mask") is None:
                move = _lengthened(subject, meeting, valid.to(meeting.x.device))
                if move is not None and move > _MOVED:
                    moved[meeting.module] = meeting, move
        share = float((~valid).double().mean())
        for group in by_mark(subject, self.code, [meeting for meeting, _ in moved.values()]):
            first, move = moved[group[0].module]
            more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
            yield self.finding(
                [meeting.name for meeting in group],
                f"{subject.name(first.module)}{more} takes statistics over padding, {share:.0%} of the positions: with "
                f"twice the length, all padding, its outputs at valid positions move by {move:.0%} (rms).",
                help="Give the norm the valid positions, nw.BatchNorm1d(C)(x, mask=valid), normalize only those "
                "(x[valid]), or use LayerNorm over the features.",
                falsify="The same outputs at valid positions, whatever the length of the padding.",
                numbers={"padded_share": share, "change_at_valid_positions": move, "threshold": _MOVED},
            )


def _lengthened(subject: Subject, meeting: Meeting, valid: Tensor) -> float | None:
    """How far outputs at valid positions move, of their size, when the length is doubled; None if not known."""
    module: Any = meeting.module
    x, (samples, length) = meeting.x, valid.shape
    within = isinstance(module, nn.GroupNorm | nn.modules.instancenorm._InstanceNorm)
    if not within and (module not in subject.batch_norms().values() or not trained(subject)):
        return None
    if x.dim() == 3 and x.shape[0] == samples and x.shape[2] == length:
        vector, ends = x[:, :, -1], valid[:, -1]
        vector = torch.where(ends.unsqueeze(1), vector[~ends].mean(0), vector)
        longer = torch.cat((x, vector.unsqueeze(2).expand(-1, -1, length)), 2)
        where = valid.unsqueeze(1).expand(-1, x.size(1), -1)
    elif x.dim() == 2 and x.size(0) == samples * length and not within:
        padded = x[~valid.reshape(-1)]
        # rows in another order than sample by sample would not all be the same padding
        if float((padded - padded[:1]).abs().max()) > 1e-5 * float(x.abs().max()):
            return None
        longer = torch.cat((x, padded[:1].expand(len(x), -1)))
        where = valid.reshape(-1, 1).expand(-1, x.size(1))
    else:
        return None
    outputs = []
    for value in (x, longer):
        with training_modes(subject), torch.no_grad():
            if not within and not uses_batch(module):
                return None
            outputs.append(module.forward(value.clone()).double())
    short = outputs[0][where]
    long = outputs[1][tuple(slice(size) for size in x.shape)][where]
    return float((long - short).square().mean().sqrt() / short.square().mean().sqrt().clamp(min=1e-12))


def valid_positions(batch: Any, whole: bool = False) -> Tensor | None:
    """Which positions of a batch of sequences are no padding, (N, L); None if nothing shows padding at the ends.

    From a mask (N, L) or lengths (N) among the tensors, else from floating-point sequences (N, L, C) or (N, C, L) that
    end in zeros, or integers (N, L) that end in one number. Of a tuple the first element is looked at, or the `whole`.
    """
    given = batch[0] if isinstance(batch, (list, tuple)) and batch and not whole else batch
    tensors = list(tensors_in(given))
    implied = [found for t in tensors if (found := _ends(t)) is not None]
    if isinstance(given, Mapping | list | tuple):
        shapes = [tuple(t.shape) for t in tensors]
        for t in tensors:
            if (mask := _mask(t)) is not None and shapes.count(tuple(t.shape)) + _longer(shapes, t) > 1:
                return mask
        for t in tensors:
            if t.dim() == 1 and not t.is_floating_point() and t.dtype != torch.bool:
                for found in implied:
                    # a label may look like a length; a length is where the data end, or the end is a real zero
                    counts = found.sum(1)
                    if (
                        len(t) == len(found)
                        and bool((t >= counts).all())
                        and float((t == counts).double().mean()) > 0.8
                    ):
                        return torch.arange(found.size(1), device=t.device) < t.unsqueeze(1)
    return implied[0] if implied else None


def _longer(shapes: list[tuple[int, ...]], mask: Tensor) -> int:
    """How many of the tensors have the mask's axes and one more."""
    samples, length = mask.shape
    return sum(len(shape) == 3 and shape[0] == samples and length in shape[1:] for shape in shapes)


def _mask(t: Tensor) -> Tensor | None:
    """The valid positions if this tensor is a mask with padding at the ends, True or 1 meaning either."""
    if t.dim() != 2 or min(t.shape) < 2 or not bool(((t == 0) | (t == 1)).all()):
        return None
    start = t[0, 0]
    valid = t == start
    ends = bool((t[:, 0] == start).all()) and bool((valid.int().diff(dim=1) <= 0).all())
    return valid if ends and not bool(valid.all()) else None


def _ends(t: Tensor) -> Tensor | None:
    """The valid positions of sequences that end, at different places, in one value."""
    if t.dim() == 3 and t.is_floating_point():
        blank = [(t == 0).all(2), (t == 0).all(1)]
    elif t.dim() == 2 and not t.is_floating_point() and t.dtype != torch.bool and min(t.shape) > 1:
        # the number that ends most sequences
        blank = [t == t[:, -1].mode().values]
    else:
        return None
    for empty in blank:
        if empty.size(1) < 2:
            continue
        padding = empty.flip(1).int().cumprod(1).flip(1).bool()
        lengths = (~padding).sum(1)
        # padding is nowhere but at the ends, of half of the sequences at least (a pair of equal numbers is chance),
        # and not all are of one length, as borders are
        if (
            not bool((empty & ~padding).any())
            and float((padding.sum(1) > 1).double().mean()) >= 0.5
            and len(lengths.unique()) > 2
        ):
            return ~padding
    return None
