"""NW505: moving statistics that forget too fast, or whose two weights do not add up."""

from __future__ import annotations

from collections.abc import Iterable

from ..check import Check, Finding
from ..handwritten import HandWritten, Role, by_class, handwritten
from ..probe import Subject

# above one half a statistic is mostly one batch's; torch's weight of the new batch is 0.1, Keras' 0.01
_FAST = 0.5
# at 1 the last batch is kept, which is a choice (MAML); below, rounding of float32 is 1e-6
_ALL = 0.999
_SUM = 0.005


class AveragingCoefficient(Check):
    """Moving statistics average with a wrong coefficient.

    What it does
        Sets the moving statistics of a copy to known values, runs training forwards on known batches, and solves
        `new = a · old + b · batch` for a and b: exact to 1e-6. A second forward shows whether b is a schedule.

    Why is this bad
        Torch's momentum is the weight of the new batch, that of Keras and of many books the weight of the old. With
        0.9 put where 0.1 belongs, evaluation uses nearly the last batch alone. If a + b is not 1, the statistics
        converge to b / (1 − a) times the right ones.

    Example
        class BatchNorm(torch.nn.Module):
            def __init__(self, channels, momentum=0.9):
                super().__init__()
                self.momentum = momentum
                self.register_buffer("moving_mean", torch.zeros(channels))

            def forward(self, x):
                if not self.training:
                    return x - self.moving_mean
                mean = x.mean(0)
                self.moving_mean.lerp_(mean.detach(), self.momentum)
                return x - mean

        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), BatchNorm(8))
        inputs = torch.randn(64, 4)

    Use instead
        class BatchNorm(torch.nn.Module):
            def __init__(self, channels, momentum=0.9):
                super().__init__()
                self.momentum = momentum
                self.register_buffer("moving_mean", torch.zeros(channels))

            def forward(self, x):
                if not self.training:
                    return x - self.moving_mean
                mean = x.mean(0)
                self.moving_mean.lerp_(mean.detach(), 1 - self.momentum)
                return x - mean

        model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), BatchNorm(8))
        inputs = torch.randn(64, 4)

    Fix safety
        By hand: which coefficient was meant is yours to say.

    References
        torch.nn.BatchNorm2d, note on momentum; keras.layers.BatchNormalization.
    """

    code = "NW505"
    name = "averaging-coefficient"
    severity = "warning"
    evidence = "measured"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        faulty = [(one, wrong) for one in handwritten(subject) if (wrong := _wrong(one))]
        for group in by_class(faulty):
            one, (role, what, severity, help) = group[0]
            yield self.finding(
                (other.name for other, _ in group),
                f"{subject.name(one.module)}: {role.label} becomes {role.keep:.4g} of its old value and "
                f"{role.weigh:.4g} of the batch's {role.statistic}: {what}.",
                severity=severity,
                falsify="With statistics set to known values, one training forward moves them by a small part, and the "
                "two weights add up to 1.",
                numbers={"weight of the old value": role.keep, "weight of the new batch": role.weigh},
                help=help,
            )


def _wrong(one: HandWritten) -> tuple[Role, str, str, str] | None:
    if not one.statistics:
        return None
    for role in one.roles.values():
        total = role.keep + role.weigh
        if not role.steady or "deviation" in role.statistic:
            continue
        if abs(total - 1) > max(_SUM, _biased(one, role)) and abs(role.keep) < 1 - _SUM and role.keep > _SUM:
            limit = role.weigh / (1 - role.keep)
            what = f"they add up to {total:.4g}, and it converges to {limit:.3g} times the {role.statistic}"
            return role, what, "error", "Let the weights add up to 1: new = (1 − c) · old + c · batch."
        if _FAST < role.weigh < _ALL:
            what = f"evaluation will use {role.weigh:.0%} the last batch alone"
            help = (
                f"Torch's momentum weighs the new batch, others' the old: if {role.weigh:.3g} was meant as the "
                f"weight of the old, use {1 - role.weigh:.3g} here."
            )
            return role, what, "warning", help
    weighs = [role for role in one.roles.values() if role.steady]
    if len(weighs) > 1 and max(r.weigh for r in weighs) > 2 * min(r.weigh for r in weighs) > 0:
        fast, slow = max(weighs, key=lambda r: r.weigh), min(weighs, key=lambda r: r.weigh)
        if fast.weigh >= _ALL:
            return None
        what = f"{slow.label} takes {slow.weigh:.4g}, so that mean and variance are of different batches"
        return fast, what, "warning", "Average the mean and the variance with the same coefficient."
    return None


def _biased(one: HandWritten, role: Role) -> float:
    """What a variance corrected otherwise than by n or n − 1, over so few values, may be off."""
    count = one.trial(0).numel() / one.x.shape[role.axis]
    return 2 * role.weigh / max(count - 1, 1)
