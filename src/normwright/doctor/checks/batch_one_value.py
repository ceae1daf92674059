from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..check import Check, Finding
from ..probe import Subject
from ..values import (
    Meeting,
    by_mark,
    meetings,
    require_calls,
    total_count,
    training_modes,
    unmoved,
    uses_batch,
    written_by_hand,
)

__all__ = ["OneValuePerStatistic"]

# of the input's change; float32's rounding times 1/√eps is 4e-5, and a norm with two values passes about 1
_ROUNDING = 1e-3


class OneValuePerStatistic(Check):
    """A statistic is taken of a single value.

    What it does
        Runs a step of training and counts the values of each statistic: N·H·W for a batch norm, H·W for an instance
        norm, the normalized elements for a layer norm; of hand-written norms the axes are measured. Where it is one,
        another input is given to the layer alone, to see that its output stays the same, or that the layer refuses.

    Why is this bad
        A value less its own mean is zero. What comes out is the bias, whatever went in; torch's batch and instance
        norms raise instead. Group norms with one element a group are NW207.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        inputs = torch.randn(1, 4)

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        inputs = torch.randn(64, 4)

    Fix safety
        Unsafe: a larger batch, or a norm over other axes, is another model; `nw.convert(model, "group")` makes one.

    References
        Wu & He 2018, Group Normalization, arXiv:1803.08494; torch.nn.functional.batch_norm, which raises "Expected
        more than 1 value per channel when training".
    """

    code = "NW201"
    name = "one-value-per-statistic"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        met, raised = meetings(subject)
        require_calls(met, raised)
        single: dict[nn.Module, tuple[Meeting, float | None]] = {}
        for meeting in (*met, *written_by_hand(subject)):
            if self._one(subject, meeting) and meeting.module not in single:
                moves = unmoved(subject, meeting)
                if (moves is None and not meeting.finished) or (moves is not None and moves < _ROUNDING):
                    single[meeting.module] = meeting, moves
        for group in by_mark(subject, self.code, [meeting for meeting, _ in single.values()]):
            first, moves = single[group[0].module]
            shape = tuple(first.x.shape)
            kind = type(first.module).__name__
            shows = f"raises {type(raised).__name__}" if moves is None else "puts out its bias for any input"
            more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
            yield self.finding(
                [meeting.name for meeting in group],
                f"{kind} {subject.name(first.module)}{more} has 1 value for each statistic of an input of shape "
                f"{shape}, and {shows}.",
                help="Train with more samples a batch (drop_last=True for the rest), or use a norm over more of each "
                "sample, such as GroupNorm (nw.convert(model, 'group')); call model.eval() if this is no training.",
                falsify="An input of this shape for which the layer's output differs from its bias.",
                numbers={"values_per_statistic": 1, "shape": shape, "output_change_per_input_change": moves},
            )

    def _one(self, subject: Subject, meeting: Meeting) -> bool:
        module = meeting.module
        # what an RMS norm leaves of one value is its sign; group norms are another check's
        centred = not isinstance(module, nn.RMSNorm | nn.GroupNorm)
        if not centred or total_count(meeting) != 1:
            return False
        with training_modes(subject):
            return isinstance(module, nn.LayerNorm) or meeting.counted == 1 or uses_batch(module)
