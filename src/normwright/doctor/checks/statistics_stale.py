"""NW101: training and evaluation differ because the running statistics are not those of the layer's input."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..check import Check, Finding
from ..moments import LEAST_SAMPLES, Moments, counter, frozen, gain, momentum, names_below, off, repair, traces, unset
from ..moments import untouched as new
from ..probe import CannotRun, Subject

# Of the loss, by more than three standard errors. On LeNet at learning rate 1.0 (Fashion-MNIST, epochs 5 to 10)
# recalibration takes away 16 to 57% of the loss, and gives 2 to 15 points of accuracy; later than the first epochs at
# 0.1, and with Adam, 2 to 10% and less than a point.
LEAST_GAIN = 0.15
LEAST_POINTS = 0.01  # of accuracy: a sixth of a loss that is nearly 0 is nothing
# Outputs, in their deviation: with a loss it only has to be more than noise.
MOVED_WITH_LOSS, MOVED_WITHOUT_LOSS = 0.15, 0.3
# In deviations over the channels. With a loss this only says where, and the loss whether it matters (on LeNet with
# digits, layers off by 0.15 each together cost twelve points); without, the inputs may be other data than training's,
# and the layer has to be far off.
OFF_WITH_LOSS, OFF_WITHOUT_LOSS, FAR_OFF = 0.1, 0.5, 0.9
# In averaging lengths 1 / momentum. Before that, weights move fast and every network has a gap: measured on LeNet at
# 0.1 and with Adam, recalibration takes away up to 36% of the loss at 30 to 250 updates, and nothing is wrong.
EARLY, EARLY_GAIN = 30, 0.5


class StaleStatistics(Check):
    """Running statistics are far from the statistics of the layer's input, and evaluation pays for it.

    What it does
        Compares, layer by layer in the order of execution, running mean and variance with the statistics that a
        training forward meets now, each distance less three standard errors taken from the spread between samples and
        batches. Where a layer is off, the model is recalibrated on one half of the data and judged on the other:
        outputs have to move by much more than the choice of the half does, and the loss, if given, has to fall by
        15%. Named is the first layer that is off. A young model (fewer than 30 / momentum updates) has a gap that
        goes away, and only gross ones are reported. Frozen layers are passed over.

    Why is this bad
        Training normalizes by the batch and evaluation by the running average. If that lags behind the weights, as at
        a large learning rate, or was moved by a batch of other data, the evaluated network is not the trained one:
        the training loss looks right, and the test accuracy is low and jumps from epoch to epoch.

    Example
        net = [torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
        model = torch.nn.Sequential(*net)
        inputs = torch.randn(256, 8)
        for _ in range(400):
            model(inputs + 0.1 * torch.randn(256, 8))
        model(torch.full((8, 8), 50.0) + torch.randn(8, 8))  # one batch of something else, in training mode
        model.eval()

    Use instead
        net = [torch.nn.Linear(8, 16, bias=False), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 4)]
        model = torch.nn.Sequential(*net)
        inputs = torch.randn(256, 8)
        for _ in range(400):
            model(inputs + 0.1 * torch.randn(256, 8))
        model.eval()  # before looking at anything but training data
        model(torch.full((8, 8), 50.0) + torch.randn(8, 8))

    Fix safety
        `nw.recalibrate` over the loader, or the inputs if there is none, replaces running statistics by exact ones and
        changes nothing else; the receipt undoes it. It is safe if these data are like those that the model is for.

    References
        Wu & Johnson 2021, Rethinking "Batch" in BatchNorm, arXiv:2105.07576, section 3.
    """

    code = "NW101"
    name = "stale-running-statistics"
    severity = "warning"
    evidence = "proved"
    needs = ("inputs",)

    def find(self, subject: Subject) -> Iterable[Finding]:
        kept = frozen(subject) | names_below(subject, AveragedModel) if subject.tracked() else set()
        judged = {m for m in subject.tracked().values() if m not in kept and not new(m) and not unset(m)}
        judged = {m for m in judged if momentum(m) != 0 and not young(m, 0.05)}
        if not judged:
            return
        calls = traces(subject, training=True)
        moments = {m: found for m, c in calls.items() if m in judged and (found := Moments.of(c)) is not None}
        if moments and max(found.count for found in moments.values()) < LEAST_SAMPLES:
            raise CannotRun(f"the spread between samples is known from {LEAST_SAMPLES} samples on, and there are fewer")
        far = {m: off(m, found) for m, found in moments.items()}
        early = any(early_in_training(m) for m in far)
        least = OFF_WITH_LOSS if subject.loss is not None else FAR_OFF if early else OFF_WITHOUT_LOSS
        where = [module for module, value in far.items() if value >= least]
        if not where:
            return
        found = gain(subject)
        least = MOVED_WITHOUT_LOSS if found.before is None else MOVED_WITH_LOSS
        if found.moved < max(least, 3 * found.noise):
            return
        if found.before is not None and (found.share < LEAST_GAIN or found.sure < 3):
            return
        points = None if found.right_before is None else (found.right_after or 0.0) - found.right_before
        if points is not None and points < LEAST_POINTS:
            return
        if early and found.before is not None and found.share < EARLY_GAIN:
            return
        first, names = where[0], [subject.names[module][0] for module in where]
        also = f"; {len(names) - 1} later layers are off too" if len(names) > 1 else ""
        yield self.finding(
            names,
            f"the running statistics of {subject.name(first)} are {far[first]:.2g} deviations from its input's (root "
            f"mean square over channels, less three standard errors){also}: {found}.",
            help="Recalibrate before evaluating, nw.recalibrate(model, loader), or lower the learning rate at the end "
            "of training; look for a forward in training mode on data that are not training's.",
            falsify="inputs or loader are not like the data that the model is evaluated on, or recalibration on a "
            "second sample of them gains nothing.",
            numbers={"off by, sd": far[first], "updates": counter(first), **found.numbers},
            repair=repair(subject),
            # without a loss nobody has shown that these data are the right ones, unless they are the training data
            safe=found.before is not None or subject.loader is not None,
            severity="error" if found.share >= EARLY_GAIN and not early else None,
        )


def young(module: nn.Module, residue: float) -> bool:
    """Whether the start value still weighs more than `residue` in the running statistics."""
    weight, count = momentum(module), counter(module)
    return weight is not None and bool(count) and (1.0 - weight) ** count > residue  # type: ignore[operator]


def early_in_training(module: nn.Module) -> bool:
    """Whether the layer has seen fewer than 30 averaging lengths of updates; unknown counts as no."""
    weight, count = momentum(module), counter(module)
    return bool(weight) and bool(count) and count * weight < EARLY  # type: ignore[operator]
