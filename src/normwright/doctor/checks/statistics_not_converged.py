"""NW106: the start values 0 and 1 still weigh in the running statistics."""

from __future__ import annotations

from collections.abc import Iterable

from torch.nn import Module

from ..check import Check, Finding
from ..moments import Moments, counter, frozen, momentum, off, repair, running, traces, unset, untouched
from ..probe import Subject

RESIDUE = 0.05
# Below this many updates no layer has converged, at torch's own momentum either: training has just begun.
BEGUN = 30
# Deviations. Below, the start values happen to be near the truth, or the residue is small beside it.
LEAST = 0.25


class NotConverged(Check):
    """The running statistics still hold more than a twentieth of their start values.

    What it does
        After n updates the start values (mean 0, variance 1) weigh `(1 − momentum)ⁿ`. Where that is over 0.05, it is
        said. With inputs it is proved: the start values are taken out, `(running − w · start) / (1 − w)`, and what
        remains has to be at least twice as near to the layer's input as the statistics are now. Without the proof it
        is advice; so it is below 30 updates, and only of a model in evaluation mode, as training has just begun.

    Why is this bad
        Evaluation normalizes by a mixture of the data and of 0 and 1. It comes with small momenta (0.001 needs 3000
        updates), short fine-tuning of a new layer, and layers that only some batches reach.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16, momentum=0.001))
        inputs = 5 + 3 * torch.randn(256, 8)
        for _ in range(100):
            model(inputs[torch.randint(256, (64,))])
        model.eval()

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16, momentum=None))
        inputs = 5 + 3 * torch.randn(256, 8)
        for _ in range(100):
            model(inputs[torch.randint(256, (64,))])
        model.eval()

    Fix safety
        `nw.recalibrate` replaces running statistics by exact ones and changes nothing else. During training it is
        enough to go on.

    References
        Kingma & Ba 2015, Adam, arXiv:1412.6980, section 3 (the same bias, and its correction).
    """

    code = "NW106"
    name = "running-statistics-not-converged"
    severity = "warning"
    evidence = "proved"

    def find(self, subject: Subject) -> Iterable[Finding]:
        young = {m: w for m in subject.tracked().values() if (w := residue(m)) > RESIDUE and not unset(m)}
        young = {m: w for m, w in young.items() if not untouched(m)}
        kept = frozen(subject) if young else set()
        young = {m: w for m, w in young.items() if m not in kept}
        if not young:
            return
        seen = {}
        if subject.has("inputs"):
            calls = traces(subject, training=True)
            seen = {m: found for m, c in calls.items() if m in young and (found := Moments.of(c)) is not None}
        for module, weight in young.items():
            moments = seen.get(module)
            count = counter(module)
            numbers = {"updates": count, "momentum": momentum(module), "weight of the start values": weight}
            # training mode means that training goes on; in its first updates nothing else can be expected
            if count < BEGUN and (moments is None or subject.model.training):  # type: ignore[operator]
                continue
            proved, text = False, ""
            if moments is not None:
                now = off(module, moments)
                without = _without_start(module, weight, moments)
                if now < LEAST:
                    continue
                proved = without < now / 2 and count >= BEGUN  # type: ignore[operator]
                numbers |= {"off by, sd": now, "off by without the start values, sd": without}
                text = (
                    f"; off by {now:.2g} deviations from its input's statistics, by {without:.2g} without these values"
                )
            yield self.finding(
                subject.names[module][0],
                f"after {count} updates at momentum {momentum(module):g} the start values 0 and 1 still weigh "
                f"{weight:.2g} in the running statistics of {subject.name(module)}{text}.",
                help="Recalibrate before evaluating, nw.recalibrate(model, loader), or take momentum=None (the average "
                "over all batches) or a larger one; in a training that has just begun, go on.",
                falsify="more training batches with the same weights do not move the running statistics.",
                numbers=numbers,
                repair=repair(subject),
                safe=proved and subject.loader is not None,
                severity=None if proved else "advice",
                evidence=None if proved else "advice",
            )


def residue(module: Module) -> float:
    """The weight that the start values still have; 0 where it is not known."""
    weight, count = momentum(module), counter(module)
    if not weight or not count or not 0 < weight < 1:
        return 0.0
    return (1.0 - weight) ** count


def _without_start(module: Module, weight: float, moments: Moments) -> float:
    """How far the layer would be off if 0 and 1 had never been averaged in."""
    mean, var = running(module)  # type: ignore[misc]
    kept = module._buffers["running_mean"], module._buffers["running_var"]
    try:
        module._buffers["running_mean"] = mean / (1 - weight)
        module._buffers["running_var"] = ((var - weight) / (1 - weight)).clamp(min=0)
        return off(module, moments)
    finally:
        module._buffers["running_mean"], module._buffers["running_var"] = kept
