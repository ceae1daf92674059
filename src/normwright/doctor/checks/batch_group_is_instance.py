from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..check import Check, Finding
from ..probe import Subject
from ..values import Meeting, by_mark, meetings, require_calls

__all__ = ["GroupNormIsInstanceNorm"]


class GroupNormIsInstanceNorm(Check):
    """A group norm has one channel in each group: it is an instance norm.

    What it does
        Looks for group norms with as many groups as channels, on inputs with several places, and says whether others in
        the model share the number of groups with more channels.

    Why is this bad
        An instance norm subtracts each channel's mean over the image, and with it how strongly a feature is there at
        all. Where it is meant, for style or sound, it is right; it also comes from a fixed number of groups, such as
        32, that meets a layer of 32 channels.

    Example
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.GroupNorm(8, 8), torch.nn.ReLU(),
            torch.nn.Conv2d(8, 16, 3, bias=False), torch.nn.GroupNorm(8, 16), torch.nn.ReLU(),
        )
        inputs = torch.randn(16, 3, 8, 8)

    Use instead
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.GroupNorm(4, 8), torch.nn.ReLU(),
            torch.nn.Conv2d(8, 16, 3, bias=False), torch.nn.GroupNorm(8, 16), torch.nn.ReLU(),
        )
        inputs = torch.randn(16, 3, 8, 8)

    Fix safety
        By hand: fewer groups are another model. Where it is meant, `torch.nn.InstanceNorm2d(C, affine=True)` says it.

    References
        Wu & He 2018, Group Normalization, arXiv:1803.08494, section 3.1; Ulyanov et al. 2016, arXiv:1607.08022.
    """

    code = "NW208"
    name = "group-norm-is-instance-norm"
    severity = "advice"
    evidence = "advice"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        met, raised = meetings(subject)
        require_calls(met, raised)
        groups: list[tuple[Any, Meeting]] = [
            (m.module, m) for m in met if isinstance(m.module, nn.GroupNorm) and (m.count or 1) > 1
        ]
        alone = {norm: m for norm, m in groups if 1 < norm.num_channels == norm.num_groups}
        shared = {norm.num_groups for norm, _ in groups if norm not in alone}
        for group in by_mark(subject, self.code, list(alone.values())):
            module: Any = group[0].module
            more = f" (and {len(group) - 1} more)" if len(group) > 1 else ""
            others = ", as many as other layers have for more channels" if module.num_groups in shared else ""
            yield self.finding(
                [meeting.name for meeting in group],
                f"{subject.name(module)}{more} is an instance norm: {module.num_groups} groups for "
                f"{module.num_channels} channels{others}.",
                help="Take fewer groups (nw.convert leaves at least two channels in each), or InstanceNorm if it is "
                "meant.",
                falsify="More than one channel in a group.",
                numbers={"channels_per_group": 1, "groups": module.num_groups},
            )
