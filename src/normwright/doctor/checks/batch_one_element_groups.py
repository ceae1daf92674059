from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..check import Check, Finding
from ..probe import Subject
from ..values import Meeting, by_mark, meetings, require_calls, unmoved

__all__ = ["OneElementGroups"]

# of the input's change; float32's rounding times 1/√eps is 4e-5, and a norm with two values passes about 1
_ROUNDING = 1e-3


class OneElementGroups(Check):
    """A group norm has one element in each group, and erases its input.

    What it does
        Counts the elements of each group, channels a group times places. Where it is one, gives the layer another
        input, to see that the output stays the same.

    Why is this bad
        An element less the mean of itself is zero: the output is the bias for any input, in training and evaluation,
        and no gradient passes. torch raises only for a single sample. It comes from as many groups as channels on
        (N, C).

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GroupNorm(8, 8), torch.nn.ReLU())
        inputs = torch.randn(64, 4)

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GroupNorm(2, 8), torch.nn.ReLU())
        inputs = torch.randn(64, 4)

    Fix safety
        By hand: fewer groups are another model.

    References
        Wu & He 2018, Group Normalization, arXiv:1803.08494, equation 7.
    """

    code = "NW207"
    name = "one-element-groups"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        met, raised = meetings(subject)
        require_calls(met, raised)
        single: dict[nn.Module, tuple[Meeting, float | None]] = {}
        for meeting in met:
            module = meeting.module
            if isinstance(module, nn.GroupNorm) and meeting.count == 1 and module not in single:
                moves = unmoved(subject, meeting)
                if (moves is None and not meeting.finished) or (moves is not None and moves < _ROUNDING):
                    single[module] = meeting, moves
        for group in by_mark(subject, self.code, [meeting for meeting, _ in single.values()]):
            first, moves = single[group[0].module]
            module, shape = first.module, tuple(first.x.shape)
            more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
            shows = f"raises {type(raised).__name__}" if moves is None else "puts out its bias for any input"
            yield self.finding(
                [meeting.name for meeting in group],
                f"{subject.name(module)}{more} has {module.num_groups} groups for {module.num_channels} channels of "
                f"one place (input of shape {shape}): each group is one element, and the layer {shows}.",
                help="Take fewer groups, so that several channels share one, or LayerNorm for (N, C).",
                falsify="An input of this shape for which the layer's output differs from its bias.",
                numbers={
                    "elements_per_group": 1,
                    "groups": module.num_groups,
                    "channels": module.num_channels,
                    "output_change_per_input_change": moves,
                },
            )
