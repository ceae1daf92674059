from __future__ import annotations

import statistics
from collections.abc import Iterable

from ..check import Check, Finding
from ..watch import Log

__all__ = ["SeveralUpdates"]

_SMALL = 32  # values for each statistic: the mean is then off by 18% of a deviation


class SeveralUpdates(Check):
    """Running statistics are updated several times in an optimizer step.

    What it does
        Tells two cases apart. Checkpointing: forwards within the backward pass, after which the running mean was
        another, by comparison. Accumulation: as many updates of the counter as backward passes in a step, two or more
        (the median of the steps looked at), where the smallest number of values that a statistic is taken over is
        below 32. Several forwards with one backward pass (a siamese network) are neither.

    Why is this bad
        A recomputed forward enters the same batch a second time: its weight is `1 − (1 − momentum)²` in place of
        `momentum`, 0.19 for 0.1, and the average reaches back over half as many batches. Accumulation makes the
        optimizer's batch larger, but not batch norm's: each micro-batch is normalized by itself.

    Example
        from torch.utils.checkpoint import checkpoint
        block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU())
        model = torch.nn.Sequential(block, torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for _ in range(4):
                optimizer.zero_grad()
                y = model[1](checkpoint(block, torch.randn(32, 4), use_reentrant=False))
                y.square().mean().backward()
                optimizer.step()
        report = watch.report

    Use instead
        from torch.utils.checkpoint import checkpoint
        block = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 8), torch.nn.ReLU())
        norm = torch.nn.BatchNorm1d(8)
        model = torch.nn.Sequential(block, norm, torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        with nw.watch(model, optimizer) as watch:
            for _ in range(4):
                optimizer.zero_grad()
                y = model[2](norm(checkpoint(block, torch.randn(32, 4), use_reentrant=False)))
                y.square().mean().backward()
                optimizer.step()
        report = watch.report

    Fix safety
        No operation. For checkpointing, set `momentum` to `1 − sqrt(1 − momentum)` (0.051 for 0.1), which two updates
        by the same batch make exact, or recalibrate after training (`nw.recalibrate`). For accumulation, a norm within
        each sample (`nw.convert(model, "group", inputs)`) or larger micro-batches.

    References
        torch.utils.checkpoint; github.com/csrhddlam/pytorch-checkpoint (the square root).
    """

    code = "NW803"
    name = "several-statistics-updates-per-step"
    severity = "advice"
    evidence = "advice"

    def watched(self, log: Log) -> Iterable[Finding]:
        log.need_steps(2)
        twice = {name: layer for name, layer in log.layers.items() if layer.moved_by_recomputed}
        if twice:
            name, layer = next(iter(twice.items()))
            momentum = layer.momentum
            weight = f", so that a batch has the weight {1 - (1 - momentum) ** 2:.3g}" if momentum else ""
            more = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
            yield self.finding(
                list(twice),
                f"{layer.name}{more} runs again within the backward pass (checkpointing, {layer.recomputed} times in "
                f"{log.count} steps) and updates its running statistics twice by the same batch{weight}.",
                help="Set momentum to 1 − sqrt(1 − momentum), or run nw.recalibrate after training.",
                falsify="A recomputed forward after which the running mean is bit for bit the same.",
                numbers={"recomputed_forwards": layer.recomputed, "steps": log.count, "layers": len(twice)},
            )
        looks = [step for step in log.looks if step.updates]
        backwards = statistics.median([step.backwards for step in looks]) if looks else 0
        if backwards < 2:
            return
        small = {}
        for name, layer in log.layers.items():
            updates = statistics.median([(step.updates or {}).get(name, 0) for step in looks])
            if name not in twice and updates == backwards and layer.values is not None and layer.values < _SMALL:
                small[name] = layer
        if small:
            layer = min(small.values(), key=lambda layer: layer.values or 0)
            yield self.finding(
                list(small),
                f"{layer.name} is updated {backwards:g} times in an optimizer step, by micro-batches of "
                f"{layer.values} values for each statistic: accumulation does not enlarge batch norm's batch.",
                help="Use larger micro-batches, or a norm within each sample (nw.convert(model, 'group', inputs)).",
                falsify=f"Micro-batches with {_SMALL} values or more for each statistic.",
                numbers={"updates_per_step": backwards, "values_per_statistic": layer.values, "threshold": _SMALL},
            )
