"""NW113: averaged weights with the statistics of other weights."""

from __future__ import annotations

from collections.abc import Iterable

from torch.optim.swa_utils import AveragedModel

from ..check import Check, Finding
from ..moments import LEAST_SAMPLES, Moments, gain, off, repair, traces, unset
from ..probe import CannotRun, Subject

# Deviations, outputs in theirs, and the part of the loss: the cause is known here, so that less is asked than of
# statistics in general.
LEAST_OFF, LEAST_MOVED, LEAST_GAIN = 0.25, 0.2, 0.05


class AveragedWithoutRecalibration(Check):
    """Weights were averaged, and the running statistics are those of other weights.

    What it does
        Looks for `torch.optim.swa_utils.AveragedModel` with `use_buffers=False` that has averaged something, compares
        the statistics of its layers with what its own activations have, and recalibrates on one half of the data to
        see the outputs of the other move.

    Why is this bad
        The average takes over the buffers of the last model that it was given: they describe the activations of that
        one. No network with the averaged weights has run, so nobody has measured its own; stochastic weight averaging
        loses most of its gain, or all.

    Example
        from torch.optim.swa_utils import AveragedModel

        net = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.ReLU())
        model = AveragedModel(net)
        inputs = 2 + 3 * torch.randn(256, 8)
        for _ in range(50):
            torch.nn.init.normal_(net[0].weight)  # in place of training
            net(inputs)
            model.update_parameters(net)
        model.eval()

    Use instead
        from torch.optim.swa_utils import AveragedModel, update_bn

        net = torch.nn.Sequential(torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.ReLU())
        model = AveragedModel(net)
        inputs = 2 + 3 * torch.randn(256, 8)
        for _ in range(50):
            torch.nn.init.normal_(net[0].weight)  # in place of training
            net(inputs)
            model.update_parameters(net)
        update_bn([inputs], model)
        model.eval()

    Fix safety
        `nw.recalibrate` over the training data (torch's `update_bn`, exact) changes running statistics only.

    References
        Izmailov et al. 2018, Averaging Weights Leads to Wider Optima, arXiv:1803.05407, section 3.2.
    """

    code = "NW113"
    name = "averaged-weights-without-recalibration"
    severity = "error"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        averages = [
            module
            for module in subject.modules.values()
            if isinstance(module, AveragedModel) and not module.use_buffers and int(module.n_averaged) > 0  # type: ignore[arg-type]
        ]
        for average in averages:
            inside = set(average.modules())
            names = [name for name, module in subject.tracked().items() if module in inside and not unset(module)]
            if not names:
                continue
            moments = {}
            for module, calls in traces(subject, training=True).items():
                if module in inside and (found := Moments.of(calls)) is not None:
                    moments[module] = found
            if moments and max(found.count for found in moments.values()) < LEAST_SAMPLES:
                raise CannotRun(f"the spread between samples is known from {LEAST_SAMPLES} samples on")
            far = {m: value for m, found in moments.items() if not unset(m) and (value := off(m, found)) >= LEAST_OFF}
            if not far:
                continue
            change = gain(subject, tuple(names))
            if change.moved < max(LEAST_MOVED, 3 * change.noise):
                continue
            if change.before is not None and (change.share < LEAST_GAIN or change.sure < 3):
                continue
            first, count = next(iter(far)), int(average.n_averaged)  # type: ignore[arg-type]
            yield self.finding(
                [subject.names[m][0] for m in far],
                f"{subject.name(average)} averages {count} sets of weights and takes the last one's buffers: the "
                f"running statistics of {subject.name(first)} are {far[first]:.2g} deviations from its input's: "
                f"{change}.",
                help="nw.recalibrate(averaged, loader) after the last update_parameters (or torch's update_bn).",
                falsify="recalibrating the average on training data leaves its outputs as they are.",
                numbers={"off by, sd": far[first], "averaged": count, **change.numbers},
                repair=repair(subject, tuple(names)),
                safe=change.before is not None or subject.loader is not None,
            )
