"""NW114: one running statistic for inputs of several distributions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from ..check import Check, Finding
from ..moments import Moments, batches, frozen, traces
from ..probe import NormCall, Subject

# Deviations of all inputs together, root mean square over channels, less three standard errors. Two calls whose means
# are 1.2 deviations apart, or whose deviations differ by a factor of three, are at 0.5.
LEAST = 0.5
LEAST_SAMPLES = 4  # in each call


class StatisticsDrift(Check):
    """One layer normalizes inputs of several distributions, and keeps one running statistic for all.

    What it does
        Where one forward calls a layer several times, compares the statistics of each call's input with those of all
        calls together; likewise those of several batches of the loader. The distance is less three standard errors,
        taken from the spread between samples, so that small batches do not count as different.

    Why is this bad
        In training each call, and each batch, is normalized by its own statistics, at evaluation all by one mixture:
        no call gets what it was trained with. It comes with heads shared over scales, one batch norm over the steps of
        a recurrent network, and batches that are each of one domain.

    Example
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.norm = torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16)

            def forward(self, x):
                return self.norm(self.linear(x)).relu() + self.norm(self.linear(10 * x)).relu()

        model, inputs = Net(), torch.randn(128, 8)

    Use instead
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.linear = torch.nn.Linear(8, 16, bias=False)
                self.first, self.second = torch.nn.BatchNorm1d(16), torch.nn.BatchNorm1d(16)

            def forward(self, x):
                return self.first(self.linear(x)).relu() + self.second(self.linear(10 * x)).relu()

        model, inputs = Net(), torch.randn(128, 8)

    Fix safety
        There is no operation that needs no change of code: a batch norm for each call (weights may stay shared), or a
        norm without running statistics; `nw.split_domains` for domains.

    References
        Cooijmans et al. 2017, Recurrent Batch Normalization, arXiv:1603.09025, section 3; Wu & Johnson 2021,
        arXiv:2105.07576, sections 4 and 5 (domains, shared heads).
    """

    code = "NW114"
    name = "one-statistic-for-several-distributions"
    severity = "warning"
    evidence = "measured"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        if not subject.tracked():
            return
        kept = frozen(subject)
        single = subject.forward(training=True)
        shared = [m for m in subject.tracked().values() if m not in kept and len(single.of(m)) > 1]
        for module in shared:
            yield from self._look(subject, module, [[call] for call in single.of(module)], "call")
        if subject.loader is None or len(batches(subject)) < 2:
            return
        for module, calls in traces(subject, training=True).items():
            if module in kept or module in shared:
                continue
            found = list(self._look(subject, module, [[call] for call in calls], "batch"))
            yield from found
            if found:  # what follows has this one's outputs
                return

    def _look(
        self, subject: Subject, module: nn.Module, groups: Sequence[Sequence[NormCall]], what: str
    ) -> Iterable[Finding]:
        parts = [Moments.of(group) for group in groups]
        whole = Moments.of([call for group in groups for call in group])
        if whole is None or any(part is None or part.count < LEAST_SAMPLES for part in parts):
            return
        apart = [_apart(part, whole) for part in parts if part is not None]
        if max(apart) < LEAST:
            return
        worst = apart.index(max(apart))
        part = parts[worst]
        scale = whole.var.sqrt().clamp(min=1e-12)
        shift = float(((part.mean - whole.mean) / scale).square().mean().sqrt())  # type: ignore[union-attr]
        ratio = float((part.var.sqrt() / scale).log().mean().exp())  # type: ignore[union-attr]
        plural = "calls in one forward" if what == "call" else "batches of the loader"
        yield self.finding(
            subject.names[module][0],
            f"{subject.name(module)} has one running statistic for {len(apart)} {plural} that differ: {what} "
            f"{worst + 1} is {max(apart):.2g} deviations from all together (its mean by {shift:.2g}, its deviation "
            f"{ratio:.2g} of theirs).",
            help="Give each call its own batch norm (the weights before it may stay shared), or use group norm."
            if what == "call"
            else "Mix the domains within each batch, or keep statistics for each, nw.split_domains(model, n) and "
            "nw.recalibrate(model, domains=[…]).",
            falsify=f"on more data the statistics of every {what} are those of all together.",
            numbers={"apart, sd": max(apart), "mean apart, sd": shift, "deviation, ratio": ratio, plural: len(apart)},
        )


def _apart(part: Moments, whole: Moments) -> float:
    """Distance between a part's distribution and that of all, in its deviations, less three standard errors."""
    scale = whole.var.sqrt().clamp(min=1e-12)
    squared = ((part.mean - whole.mean) / scale).square() + (part.var.sqrt() / scale - 1).square()
    error = (part.mean_error.square() + part.sd_error.square()) / scale.square()
    live = whole.var > 1e-10 * (whole.mean.square() + 1)  # a constant channel has no deviation to measure in
    if not bool(live.any()):
        return 0.0
    return float((squared - 9 * error)[live].clamp(0.0, 1.0).mean().sqrt())
