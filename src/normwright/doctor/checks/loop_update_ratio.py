from __future__ import annotations

import statistics
from collections.abc import Iterable

from torch import Tensor

from ..check import Check, Finding
from ..watch import Log

__all__ = ["UpdateOutOfRange"]

_LOOKS, _WARM_UP = 8, 4
_LARGE, _SMALL = 0.3, 1e-7  # 1e-3 is usual; these are 300 times more, and what float32 rounds away


class UpdateOutOfRange(Check):
    """An optimizer step changes the weights by far too much, or by nothing.

    What it does
        Measures ‖update‖ / ‖weight‖ of linear layers and convolutions over one step, in the steps looked at, and takes
        the median without the first four. Above 0.3 or below 1e-7 is found; about 1e-3 is usual. Weights that no given
        optimizer holds, or whose learning rate is 0, are left out.

    Why is this bad
        A weight that changes by a third at every step keeps nothing of what it learned; one that changes by less than
        1e-7 is, in float32, not trained at all.

    Example
        body = [torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
        model = torch.nn.Sequential(*body, torch.nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-10)
        with nw.watch(model, optimizer) as watch:
            for _ in range(20 * 8):
                optimizer.zero_grad()
                (model(torch.randn(8, 4)) - 1).square().mean().backward()
                optimizer.step()
        report = watch.report

    Use instead
        body = [torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU()]
        model = torch.nn.Sequential(*body, torch.nn.Linear(8, 1))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        with nw.watch(model, optimizer) as watch:
            for _ in range(20 * 8):
                optimizer.zero_grad()
                (model(torch.randn(8, 4)) - 1).square().mean().backward()
                optimizer.step()
        report = watch.report

    Fix safety
        No operation: another learning rate.

    References
        Karpathy, CS231n notes, "ratio of weights:updates".
    """

    code = "NW809"
    name = "update-out-of-range"
    severity = "advice"
    evidence = "advice"

    def watched(self, log: Log) -> Iterable[Finding]:
        log.need_steps(_LOOKS)
        medians = {
            name: statistics.median(ratios[_WARM_UP:])
            for name, ratios in log.ratios.items()
            if len(ratios) >= _LOOKS + _WARM_UP and _is_stepped(name, log)
        }
        for what, names in (
            ("large", [name for name, ratio in medians.items() if ratio > _LARGE]),
            ("small", [name for name, ratio in medians.items() if ratio < _SMALL]),
        ):
            if not names:
                continue
            worst = (max if what == "large" else min)(names, key=lambda name: medians[name])
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            yield self.finding(
                [name.removesuffix("weight").removesuffix(".") for name in names],
                f"A step changes {worst}{more} by {medians[worst]:.2g} of its norm (median); about 1e-3 is usual.",
                help=f"{'Lower' if what == 'large' else 'Raise'} the learning rate of these weights.",
                falsify=f"A median ratio between {_SMALL:g} and {_LARGE:g} over as many steps.",
                numbers={
                    "update_to_weight": medians[worst],
                    "lowest": _SMALL,
                    "highest": _LARGE,
                    "weights": len(names),
                },
            )


def _is_stepped(name: str, log: Log) -> bool:
    """Whether a given optimizer moves this weight; without an optimizer, whether it moves at all."""
    if not log.optimizers:
        return any(log.ratios[name])
    module, _, key = name.rpartition(".")
    weight: Tensor | None = log.subject.modules[module]._parameters.get(key)
    groups = (group for optimizer in log.optimizers for group in optimizer.param_groups)
    return any(float(group.get("lr", 1.0)) > 0 for group in groups if any(p is weight for p in group["params"]))
