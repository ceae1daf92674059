from __future__ import annotations

from collections.abc import Iterable

from ..check import Check, Finding
from ..watch import Log

__all__ = ["StatisticsBecameNonFinite"]


class StatisticsBecameNonFinite(Check):
    """Running statistics became NaN or infinite in training.

    What it does
        Looks at the running statistics in the first eight steps and every seventeenth after them, and again when the
        report is made. The step after which the first value was not finite, and the layer, are shown.

    Why is this bad
        A running average never forgets NaN: one batch with an overflow makes evaluation NaN for good, while training,
        which normalizes by the batch, goes on as if nothing had happened.

    Example
        body = [torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 8), torch.nn.ReLU()]
        model = torch.nn.Sequential(*body, torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for i in range(6):
                x = torch.randn(32, 4)
                x[0, 0] = float("nan") if i == 2 else 0.0
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                if torch.isfinite(loss):
                    optimizer.step()
        report = watch.report

    Use instead
        body = [torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 8), torch.nn.ReLU()]
        model = torch.nn.Sequential(*body, torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for i in range(6):
                x = torch.randn(32, 4)
                optimizer.zero_grad()
                model(x.nan_to_num()).square().mean().backward()
                optimizer.step()
        report = watch.report

    Fix safety
        No operation while it trains. Keep such batches out, or clamp; afterwards `nw.recalibrate(model, loader)` makes
        the statistics anew.

    References
        torch.nn.BatchNorm2d: running = (1 − momentum) · running + momentum · batch, in which NaN stays.
    """

    code = "NW804"
    name = "statistics-became-nonfinite"
    severity = "error"
    evidence = "measured"

    def watched(self, log: Log) -> Iterable[Finding]:
        log.need_steps()
        bad = {
            name: log.count if layer.nonfinite_at is None else layer.nonfinite_at
            for name, layer in log.layers.items()
            if layer.nonfinite_at is not None or not layer.finite
        }
        if not bad:
            return
        where = min(bad, key=lambda name: bad[name])
        more = f" (and {len(bad) - 1} more layers)" if len(bad) > 1 else ""
        yield self.finding(
            sorted(bad, key=lambda name: bad[name]),
            f"The running statistics of {log.layers[where].name}{more} are not finite, seen at step {bad[where]}.",
            help="Find the batch that overflowed, keep such batches out, and run nw.recalibrate(model, loader).",
            falsify="Finite running_mean and running_var of the layer.",
            numbers={"seen_at_step": bad[where], "layers": len(bad)},
        )
