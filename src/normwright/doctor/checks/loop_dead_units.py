from __future__ import annotations

import statistics
from collections.abc import Iterable

from ..check import Check, Finding
from ..units import MANY, enough_dead
from ..watch import Log

__all__ = ["UnitsDieInTraining"]

_SATURATED = 0.9


class UnitsDieInTraining(Check):
    """Many units get no gradient, or are saturated, through all of training.

    What it does
        In the first eight steps and every seventeenth after them, notes which units of each linear layer and
        convolution (rows of its weight) got a gradient of exactly zero. Units that did in all of at least eight looks
        are dead; a layer is found where they are more than half by 4.75 deviations of a coin, since behind a
        pooling whose output hardly varies half of the units are off by chance. Of sigmoid, tanh and their hard forms
        the share of values within 1% of the range from an end is noted; above 90% on average they are saturated. An
        activation that gives the model's output is left out. One batch alone is no evidence and is never used.

    Why is this bad
        No gradient reaches what lies before such a unit, so that it stays as it is: capacity that is paid for and not
        used. After too large a step, or with a bias far below zero, it is most of a layer.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
        with torch.no_grad():
            model[0].bias[:60] = -100.0
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for _ in range(10):
                optimizer.zero_grad()
                (model(torch.randn(32, 4)) - 1).square().mean().backward()
                optimizer.step()
        report = watch.report

    Use instead
        body = [torch.nn.Linear(4, 64), torch.nn.BatchNorm1d(64), torch.nn.ReLU()]
        model = torch.nn.Sequential(*body, torch.nn.Linear(64, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for _ in range(10):
                optimizer.zero_grad()
                (model(torch.randn(32, 4)) - 1).square().mean().backward()
                optimizer.step()
        report = watch.report

    Fix safety
        No operation: a smaller learning rate, another initialization, or a norm before the activation.

    References
        Glorot & Bengio 2010 (saturation); Lu et al. 2019, Dying ReLU and Initialization, arXiv:1903.06733.
    """

    code = "NW808"
    name = "units-die-in-training"
    severity = "warning"
    evidence = "measured"

    def watched(self, log: Log) -> Iterable[Finding]:
        log.need_steps(MANY)
        for name, units in log.units.items():
            dead, number = int(units.silent.sum()), units.silent.numel()
            if units.looks >= MANY and enough_dead(dead, number):
                place = name.removesuffix("weight").removesuffix(".")
                yield self.finding(
                    place,
                    f"{dead} of {number} units of {place or 'the model'} got no gradient in any of {units.looks} steps "
                    "looked at: they are dead.",
                    help="Lower the learning rate or change the initialization, or put a norm before the activation.",
                    falsify="A gradient other than zero in the row of such a unit, in any batch.",
                    numbers={"dead_units": dead, "units": number, "looks": units.looks},
                )
        for name, saturation in log.saturation.items():
            share = statistics.fmean(saturation.shares) if saturation.shares else 0.0
            if len(saturation.shares) >= MANY and share > _SATURATED and not saturation.last:
                yield self.finding(
                    name,
                    f"{share:.1%} of the values of {name or 'the model'} lay within 1% of an end of its range, on "
                    f"average over {len(saturation.shares)} steps looked at: it is saturated.",
                    help="Scale down what it reads (a smaller initialization, a norm before it).",
                    falsify=f"A share of at most {_SATURATED:.0%} over as many batches.",
                    numbers={"saturated_share": share, "threshold": _SATURATED, "looks": len(saturation.shares)},
                )
