from __future__ import annotations

from collections.abc import Iterable

import torch

from ..check import Check, Finding
from ..watch import LayerLog, Log

__all__ = ["GammaDying"]

_STEPS = 8
_LEFT = 0.01  # of the value at the start
_STARTED = 0.1  # what began near 0 (zero-initialized residuals, layer scale) has not died
_SHARE = 0.5


class GammaDying(Check):
    """The scale of a normalization layer goes to zero.

    What it does
        Compares |γ| of each channel with what it was when the watch began. A layer of which half of the channels or
        more have lost 99% is found; channels that began below 0.1 do not count. The weight decay on γ is shown.

    Why is this bad
        A channel with γ near 0 is a constant: the layers before it get no gradient, and weight decay, which takes the
        same share at every step, leaves it there. Between norms the scale of the weights does not matter, so that
        decay on γ is what shrinks the network's outputs.

    Example
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=3.0)
        with nw.watch(model, optimizer, ignore=["NW809"]) as watch:
            for _ in range(40):
                optimizer.zero_grad()
                model(torch.randn(32, 4)).square().mean().backward()
                optimizer.step()
        report = watch.report

    Use instead
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))
        optimizer = torch.optim.SGD(nw.param_groups(model, 1e-4), lr=0.1)
        with nw.watch(model, optimizer) as watch:
            for _ in range(40):
                optimizer.zero_grad()
                model(torch.randn(32, 4)).square().mean().backward()
                optimizer.step()
        report = watch.report

    Fix safety
        No operation on a running optimizer: build it from `nw.param_groups(model, weight_decay)`, which decays no norm.
        Where channels are pruned by their γ on purpose, say so: `nw.intended("NW807", "why")(model)`.

    References
        He et al. 2019, arXiv:1812.01187 (no decay of γ and β); Liu et al. 2017, arXiv:1708.06519 (pruning by γ).
    """

    code = "NW807"
    name = "gamma-dying"
    severity = "warning"
    evidence = "measured"

    def watched(self, log: Log) -> Iterable[Finding]:
        log.need_steps(_STEPS)
        dying = {name: share for name, layer in log.layers.items() if (share := _died(layer)) >= _SHARE}
        if not dying:
            return
        where = max(dying, key=lambda name: dying[name])
        layer = log.layers[where]
        decay = weight_decay_of(layer.module._parameters.get("weight"), log)
        why = f" with a weight decay of {decay:g} on it" if decay else ""
        more = f" (and {len(dying) - 1} more layers)" if len(dying) > 1 else ""
        yield self.finding(
            sorted(dying, key=lambda name: -dying[name]),
            f"γ of {layer.name}{more} has lost 99% of its size in {dying[where]:.0%} of the channels within "
            f"{log.count} steps{why}.",
            help="Build the optimizer from nw.param_groups(model, weight_decay), so that γ and β are not decayed.",
            falsify=f"More than half of the channels with |γ| above {_LEFT:g} of its value at the start.",
            numbers={"share_of_channels": dying[where], "steps": log.count, "weight_decay": decay},
        )


def _died(layer: LayerLog) -> float:
    """The share of the channels that had a scale and have lost it."""
    if layer.weight_before is None or layer.weight is None or layer.weight.shape != layer.weight_before.shape:
        return 0.0
    started = layer.weight_before >= _STARTED
    if not started.any():
        return 0.0
    return float((layer.weight[started] < _LEFT * layer.weight_before[started]).float().mean())


def weight_decay_of(parameter: torch.Tensor | None, log: Log) -> float:
    """The decay of a parameter by the optimizers given; 0 where none holds it."""
    groups = (group for optimizer in log.optimizers for group in optimizer.param_groups)
    held = (group for group in groups if any(p is parameter for p in group["params"]))
    return next((float(group.get("weight_decay", 0.0)) for group in held), 0.0)
