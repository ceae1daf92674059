from __future__ import annotations

from collections.abc import Iterable

from ..check import Check, Finding
from ..watch import Log

__all__ = ["StatisticsDoNotMove"]

_LOOKS = 4  # one after the other, in each of which training forwards ran
_FAR = 0.1  # of a deviation: an average that has arrived is nearer, one in float32 then moves


class StatisticsDoNotMove(Check):
    """Running statistics stand still while the model trains.

    What it does
        Compares the running statistics before and after a step, bit for bit, in the first eight steps and every
        seventeenth after them. Four looks in a row without a change, in which the layer ran in training mode, and a
        running mean that is more than 0.1 deviations from the mean of its batch, are found. Where the average has
        arrived at the batch's statistics, standing still is no fault.

    Why is this bad
        What is used at evaluation is not what the weights were trained with. It happens with momentum 0, where buffers
        are in bfloat16 (an update below 1/256 of the value is rounded away), and where the buffers are overwritten
        from another process or a checkpoint at every step.

    Example
        norm = torch.nn.BatchNorm1d(4, momentum=0.0)
        model = torch.nn.Sequential(norm, torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for _ in range(6):
                optimizer.zero_grad()
                model(torch.randn(32, 4) + 3).square().mean().backward()
                optimizer.step()
        report = watch.report

    Use instead
        norm = torch.nn.BatchNorm1d(4)
        model = torch.nn.Sequential(norm, torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for _ in range(6):
                optimizer.zero_grad()
                model(torch.randn(32, 4) + 3).square().mean().backward()
                optimizer.step()
        report = watch.report

    Fix safety
        No operation while it trains. Keep buffers in float32 and momentum above 0; after training
        `nw.recalibrate(model, loader)` makes exact statistics.

    References
        Ioffe & Szegedy 2015, arXiv:1502.03167, section 3.1; torch.nn.BatchNorm2d, momentum.
    """

    code = "NW805"
    name = "statistics-do-not-move"
    severity = "warning"
    evidence = "measured"

    def watched(self, log: Log) -> Iterable[Finding]:
        log.need_steps(_LOOKS)
        still = {
            name: layer
            for name, layer in log.layers.items()
            if layer.unmoved >= _LOOKS and layer.distance is not None and not layer.distance <= _FAR
        }
        if not still:
            return
        worst = max(still.values(), key=lambda layer: layer.distance or 0.0)
        more = f" (and {len(still) - 1} more layers)" if len(still) > 1 else ""
        buffers = {str(b.dtype).removeprefix("torch.") for b in worst.module._buffers.values() if b is not None}
        yield self.finding(
            sorted(still, key=lambda name: -(still[name].distance or 0.0)),
            f"The running statistics of {worst.name}{more} stayed the same bit for bit through {worst.unmoved} steps "
            f"looked at, with the running mean {worst.distance:.2g} deviations from its batch's (momentum "
            f"{getattr(worst.module, 'momentum', None)}, buffers in {' and '.join(sorted(buffers))}).",
            help="Set momentum above 0 and keep the buffers in float32; then nw.recalibrate(model, loader).",
            falsify="A training step after which running_mean is another.",
            numbers={"looks": worst.unmoved, "distance_in_deviations": worst.distance, "threshold": _FAR},
        )
